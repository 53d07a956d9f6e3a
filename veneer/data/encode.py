"""Texts into token ids and labels, with an exact boundary between what is given and what is to be learned.

Every piece of a row is tokenised by itself, as it will be when the model answers: the prompt alone, then what follows.
No token spans two pieces, so a label can never leak out of the prompt, and the prompt's ids are those of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from veneer.data.collate import IGNORED
from veneer.errors import UserError

CHUNK = 1024  # rows given to the tokenizer at once


@dataclass(frozen=True)
class Draft:
    """A row before tokenisation.

    Attributes:
        pieces: (text, whether its tokens train), in order.
        framed: put what the tokenizer begins every text with (a BOS token, for some) before, and the end token after;
            False where a chat template has already written all there is.
    """

    pieces: list[tuple[str, bool]]
    framed: bool = True


class Encoded(NamedTuple):
    """ids and labels, each (T,) with T ≤ max_length; ``full`` is the length before truncation."""

    ids: list[int]
    labels: list[int]
    full: int


class Encoder:
    """Tokenises drafts with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        framed, bare = tokenizer("a")["input_ids"], self._ids(["a"])[0]
        begins = (k for k in range(len(framed)) if framed[k : k + len(bare)] == bare)
        self.lead: list[int] = framed[: next(begins, 0)]
        line, joined = self._ids(["\n", "\na"])
        self.invents_space = joined[: len(line)] == line and joined[len(line) :] != bare

    def encode(self, drafts: Sequence[Draft], max_length: int) -> list[Encoded]:
        """Every draft in ids and labels, cut after ``max_length`` tokens.

        The first position has nothing before it to be predicted from, so its label is always ignored.
        """
        encoded: list[Encoded] = []
        for start in range(0, len(drafts), CHUNK):
            encoded.extend(self._encode(drafts[start : start + CHUNK], max_length))
        return encoded

    def _encode(self, drafts: Sequence[Draft], max_length: int) -> list[Encoded]:
        pieces = [[(text, trains) for text, trains in draft.pieces if text] for draft in drafts]
        first = iter(self._ids([row[0][0] for row in pieces if row]))
        later = iter(self._continued([text for row in pieces for text, _ in row[1:]]))
        encoded = []
        for draft, row in zip(drafts, pieces):
            ids = list(self.lead) if draft.framed else []
            labels = [IGNORED] * len(ids)
            for position, (_, trains) in enumerate(row):
                part = next(later if position else first)
                if not position and ids and part[: len(ids)] == ids:  # the text brings its own BOS
                    part = part[len(ids) :]
                ids += part
                labels += part if trains else [IGNORED] * len(part)
            if draft.framed and (not ids or ids[-1] != self.end):
                ids.append(self.end)
                labels.append(self.end if row and row[-1][1] else IGNORED)
            labels[:1] = [IGNORED] * len(labels[:1])
            encoded.append(Encoded(ids[:max_length], labels[:max_length], len(ids)))
        return encoded

    @property
    def end(self) -> int:
        """Id of the token that ends an answer."""
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token, so no answer would end; set tokenizer.eos_token")
        return self.tokenizer.eos_token_id

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _continued(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that stand after other text.

        SentencePiece tokenizers put a space before whatever they are given. In the middle of a row there is none, so
        the text is tokenised behind a line feed, or a letter where it would fuse with that, which is then taken off.
        """
        ids = self._ids(texts)
        if not self.invents_space:
            return ids
        for anchor in ("a", "\n"):  # the line feed last: where both work, its answer stands
            (head,) = self._ids([anchor])
            for k, joined in enumerate(self._ids([anchor + text for text in texts])):
                if joined[: len(head)] == head:
                    ids[k] = joined[len(head) :]
        return ids
