"""What a model is to learn from the rows: the task is seen from the columns, and every row becomes one example.

An example is a dict of what the model takes: ``input_ids`` and ``labels`` for a language model (of one length, or where
the model has an encoder each of its own), ``labels`` as a class number or a float for the others, ``image`` in place of
ids where images are classified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from veneer.data import formats
from veneer.data.collate import IGNORED
from veneer.data.columns import text_of, value_of
from veneer.data.encode import Encoder
from veneer.data.images import open_image
from veneer.data.labels import LabelNames
from veneer.data.read import Rows, kind_of, some
from veneer.errors import UserError, nearest

PAIRS = (("text", "text2"), ("premise", "hypothesis"), ("sentence1", "sentence2"))


class Dropped(NamedTuple):
    """A row that was left out because it would train nothing."""

    row: int
    where: str
    reason: str


@dataclass
class Examples:
    """What the rows became. ``rows`` and ``truncated`` go with ``items``: number of the row, whether it was cut."""

    items: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    label_names: LabelNames | None = None

    def keep(self, row: int, item: dict[str, Any], truncated: bool = False) -> None:
        self.items.append(item)
        self.rows.append(row)
        self.truncated.append(truncated)


@dataclass(frozen=True)
class Settings:
    """What the builders need besides rows: a tokenizer or image processor, and the user's choices."""

    processor: Any
    max_length: int
    template: str | None = None
    label_names: Sequence[str] | None = None
    mapped: frozenset[str] = frozenset()


def detect(rows: Rows, mapped: frozenset[str] = frozenset()) -> str:
    """The task that the first row's columns show (a key of ``TASKS``).

    Conversations, prompts and instructions are for a language model; tokens with tags, images with labels, and texts
    with labels are for the classifiers, or for regression where the labels are numbers and not all whole.
    """
    names = set(rows[0])
    kind = formats.kind_of_rows(names, mapped)
    if {"tokens", "tags"} <= names:
        return "token-classification"
    if {"image", "label"} <= names:
        return "image-classification"
    if kind in (None, "text") and "label" in names and _text_columns(rows) is not None:
        return "regression" if _fractions(rows) else "classification"
    if kind is None:
        raise UserError(
            f"{rows.where(0)}: the columns are {some(names and rows[0]) or 'none'}; expected messages, conversations, "
            "prompt and completion, instruction and output, text, text and label, tokens and tags, or image and "
            'label; name yours with columns, such as columns={"prompt": "question", "completion": "answer"}'
        )
    return "causal"


def causal(rows: Rows, settings: Settings) -> Examples:
    """Language modelling: labels are the ids of the answers, their end tokens included; all else is ignored."""
    kind = formats.kind_of_rows(rows[0], settings.mapped)
    if kind is None:
        needed = " · ".join(" and ".join(columns) for columns in formats.KINDS.values())
        raise UserError(f"{rows.where(0)}: the columns are {some(rows[0])}; a language model needs one of {needed}")
    drafts = formats.drafts(rows, kind, settings.processor, settings.template)
    whole = [(row, draft) for row, draft in enumerate(drafts) if not isinstance(draft, str)]
    encoder = Encoder(settings.processor)
    encoded = dict(zip([row for row, _ in whole], encoder.encode([d for _, d in whole], settings.max_length)))
    examples = Examples()
    for row, draft in enumerate(drafts):
        if isinstance(draft, str):
            examples.dropped.append(Dropped(row, rows.where(row), draft))
            continue
        ids, labels, full = encoded[row]
        if all(label == IGNORED for label in labels):
            cut = f"its answer lies beyond max_length, {settings.max_length} tokens of {full}"
            reason = cut if full > settings.max_length else "no token has another before it to be predicted from"
            examples.dropped.append(Dropped(row, rows.where(row), reason))
        else:
            examples.keep(row, {"input_ids": ids, "labels": labels}, full > settings.max_length)
    return examples


def seq2seq(rows: Rows, settings: Settings) -> Examples:
    """Encoder and decoder: the prompt as the tokenizer frames it, and the answer with its end token as labels."""
    kind = formats.kind_of_rows(rows[0], settings.mapped)
    if settings.template == "chat" or formats.is_jinja(settings.template):
        raise UserError("a chat template was given, and a model with an encoder takes no conversations; leave it out")
    if kind not in ("completion", "instruction"):
        raise UserError(
            f"{rows.where(0)}: the columns are {some(rows[0])}; a model with an encoder needs prompt and completion or "
            "instruction and output"
        )
    drafts = formats.drafts(rows, kind, settings.processor, settings.template)
    end, most, examples = Encoder(settings.processor).end, settings.max_length, Examples()
    for row, draft in enumerate(drafts):
        if isinstance(draft, str):
            examples.dropped.append(Dropped(row, rows.where(row), draft))
            continue
        (prompt, _), (answer, _) = draft.pieces
        ids = settings.processor(prompt, verbose=False)["input_ids"]
        labels = settings.processor(text_target=answer, verbose=False)["input_ids"]
        labels = labels if labels[-1:] == [end] else [*labels, end]
        if not ids:
            examples.dropped.append(Dropped(row, rows.where(row), "the prompt is empty"))
            continue
        cut = len(ids) > most or len(labels) > most
        if len(ids) > most:
            ids = settings.processor(prompt, truncation=True, max_length=most)["input_ids"]
        examples.keep(row, {"input_ids": ids, "labels": labels[:most]}, cut)
    return examples


def classification(rows: Rows, settings: Settings) -> Examples:
    """A class for a text or a pair of texts."""
    examples, labels = _encoded_texts(rows, settings), [value_of(rows, k, "label") for k in range(len(rows))]
    examples.label_names = LabelNames.gather(
        ((label, rows.where(row)) for row, label in enumerate(labels)),
        settings.label_names or rows.label_names.get("label"),
    )
    for item, row in zip(examples.items, examples.rows):
        item["labels"] = examples.label_names.number(labels[row], rows.where(row))
    return examples


def regression(rows: Rows, settings: Settings) -> Examples:
    """A number for a text or a pair of texts."""
    examples = _encoded_texts(rows, settings)
    for item, row in zip(examples.items, examples.rows):
        label = _number(value_of(rows, row, "label"))
        if label is None or label != label or abs(label) == float("inf"):
            raise UserError(
                f'{rows.where(row)}: the label is "{rows[row]["label"]}"; regression expects a finite number'
            )
        item["labels"] = label
    return examples


def token_classification(rows: Rows, settings: Settings) -> Examples:
    """A class for every word, carried by its first token; the word's other tokens are ignored."""
    if not getattr(settings.processor, "is_fast", False):
        raise UserError("token classification needs a fast tokenizer, which knows the word of each token")
    words = [_words(rows, row) for row in range(len(rows))]
    names = LabelNames.gather(
        ((tag, rows.where(row)) for row, (_, tags) in enumerate(words) for tag in tags),
        settings.label_names or rows.label_names.get("tags"),
    )
    examples = Examples(label_names=names)
    for row, (tokens, tags) in enumerate(words):
        if not tokens:
            examples.dropped.append(Dropped(row, rows.where(row), "there are no tokens"))
            continue
        ids, of_word, cut = _split_words(settings, tokens)
        labels = [IGNORED] * len(ids)
        for k, word in enumerate(of_word):
            if word is not None and (k == 0 or of_word[k - 1] != word):
                labels[k] = names.number(tags[word], rows.where(row))
        if all(label == IGNORED for label in labels):
            examples.dropped.append(Dropped(row, rows.where(row), "the tokenizer makes nothing of its tokens"))
        else:
            examples.keep(row, {"input_ids": ids, "labels": labels}, cut)
    return examples


def image_classification(rows: Rows, settings: Settings) -> Examples:
    """A class for an image. Every image is opened once here, so that a broken one stops the run before it starts."""
    labels = [value_of(rows, row, "label") for row in range(len(rows))]
    examples = Examples()
    examples.label_names = LabelNames.gather(
        ((label, rows.where(row)) for row, label in enumerate(labels)),
        settings.label_names or rows.label_names.get("label"),
    )
    for row, label in enumerate(labels):
        image = value_of(rows, row, "image")
        open_image(image, rows.where(row))
        examples.keep(row, {"image": image, "labels": examples.label_names.number(label, rows.where(row))})
    return examples


TASKS: dict[str, Callable[[Rows, Settings], Examples]] = {
    "causal": causal,
    "seq2seq": seq2seq,
    "classification": classification,
    "regression": regression,
    "token-classification": token_classification,
    "image-classification": image_classification,
}


def builder(task: str) -> Callable[[Rows, Settings], Examples]:
    """The function that makes examples for a task."""
    if task not in TASKS:
        raise UserError(f'there is no task "{task}"; expected auto, {", ".join(TASKS)}{nearest(task, TASKS)}')
    return TASKS[task]


def _encoded_texts(rows: Rows, settings: Settings) -> Examples:
    columns = _text_columns(rows)
    if columns is None:
        raise UserError(
            f"{rows.where(0)}: the columns are {some(rows[0])}; expected text, or a pair of texts as "
            f"{', '.join(' and '.join(pair) for pair in PAIRS)}"
        )
    texts = [[text_of(rows, row, column) for row in range(len(rows))] for column in columns]
    encoding = settings.processor(*texts, verbose=False)
    long = [row for row, ids in enumerate(encoding["input_ids"]) if len(ids) > settings.max_length]
    cut = (
        settings.processor(
            *[[texts[k][row] for row in long] for k in range(len(texts))],
            truncation=True,
            max_length=settings.max_length,
        )
        if long
        else {}
    )
    place = {row: k for k, row in enumerate(long)}
    names = [name for name in ("input_ids", "token_type_ids") if name in encoding]
    examples = Examples()
    for row in range(len(rows)):
        item = {name: cut[name][place[row]] if row in place else encoding[name][row] for name in names}
        if item["input_ids"]:
            examples.keep(row, item, row in place)
        else:
            examples.dropped.append(Dropped(row, rows.where(row), "the text is empty"))
    return examples


def _text_columns(rows: Rows) -> tuple[str, ...] | None:
    pair = next((pair for pair in PAIRS if rows[0].keys() >= set(pair)), None)
    return pair or (("text",) if "text" in rows[0] else None)


def _split_words(settings: Settings, tokens: list[str]) -> tuple[list[int], list[int | None], bool]:
    """ids, the number of each id's word, and whether the row was too long."""
    try:
        encoding, cut = settings.processor(tokens, is_split_into_words=True, verbose=False), False
        if len(encoding["input_ids"]) > settings.max_length:
            bound = {"truncation": True, "max_length": settings.max_length}
            encoding, cut = settings.processor(tokens, is_split_into_words=True, **bound), True
    except (AssertionError, ValueError) as error:
        raise UserError(f"the tokenizer takes no words ({error}); load it with add_prefix_space=True") from error
    return encoding["input_ids"], encoding.word_ids(), cut


def _words(rows: Rows, row: int) -> tuple[list[str], list[Any]]:
    """Tokens and tags of a row; a text is taken apart at white space (CSV has no lists)."""
    tokens, tags = (value_of(rows, row, column) for column in ("tokens", "tags"))
    tokens, tags = (side.split() if isinstance(side, str) else side for side in (tokens, tags))
    for column, side in (("tokens", tokens), ("tags", tags)):
        if not isinstance(side, list | tuple):
            raise UserError(f'{rows.where(row)}: column "{column}" holds {kind_of(side)}; expected a list')
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{rows.where(row)}: not every token is a text; expected a list of texts")
    if len(tokens) != len(tags):
        raise UserError(
            f"{rows.where(row)}: {len(tokens)} tokens and {len(tags)} tags; expected one tag for each token"
        )
    return list(tokens), list(tags)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _fractions(rows: Rows) -> bool:
    """Whether the labels are numbers and not all whole."""
    numbers = [number for row in rows if (number := _number(row.get("label"))) is not None]
    return len(numbers) == len(rows) and any(number % 1 != 0 for number in numbers)
