"""Tokens as text while they come: pieces that are whole characters, and stop strings that may span them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HELD = "\ufffd"  # what a tokenizer gives for half a character


class Writer:
    """Turns the tokens of one answer into text.

    ``push`` gives the text that is certain by now: whole characters, and nothing that may be the start of a stop
    string. Once ``stopped`` nothing more comes; a stop string itself is never shown.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [s for s in stops if s]
        self.stopped = False
        self._tokens: list[int] = []
        self._from = self._to = 0  # decode a window: from the last safe place, of which the text up to ``to`` is out
        self._pending = ""

    def push(self, token: int) -> str:
        """The text that has become certain with one more token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        before = self._decode(self._from, self._to)
        text = self._decode(self._from, len(self._tokens))
        if text.endswith(HELD) or len(text) <= len(before):
            return ""
        self._from, self._to = self._to, len(self._tokens)
        return self._cut(text[len(before) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        rest = self._decode(self._from, len(self._tokens))[len(self._decode(self._from, self._to)) :]
        self._to = len(self._tokens)
        found = self._cut(rest) + ("" if self.stopped else self._pending)
        self._pending = ""
        return found

    def _cut(self, text: str) -> str:
        text = self._pending + text
        ends = [at for s in self.stops if (at := text.find(s)) >= 0]
        if ends:
            self.stopped, self._pending = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, s) for s in self.stops), default=0)
        self._pending = text[len(text) - held :] if held else ""
        return text[: len(text) - held] if held else text

    def _decode(self, start: int, stop: int) -> str:
        return self.tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True) if stop > start else ""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
