"""What a run shows while it works: a protocol, plain lines, and silence."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO


class Display(Protocol):
    """Receives what happens; the command line's live panel is one, ``Lines`` another.

    ``start`` comes once with the number of optimiser steps and the facts of the run (what trains, precision, data);
    ``step`` once an optimiser step with loss, lr, tokens_per_second, peak_memory (bytes), eta (seconds), step (from 1),
    total; ``event`` with one sentence at a time; ``end`` with the run's record; ``close`` last, however the run ended.
    """

    def start(self, total: int, facts: dict[str, Any]) -> None: ...

    def step(self, values: dict[str, Any]) -> None: ...

    def event(self, text: str) -> None: ...

    def end(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, facts: dict[str, Any]) -> None:
        """Nothing."""

    def step(self, values: dict[str, Any]) -> None:
        """Nothing."""

    def event(self, text: str) -> None:
        """Nothing."""

    def end(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """Plain lines, at most one step line every ``seconds``; what a log file or a pipe gets."""

    def __init__(self, stream: TextIO | None = None, seconds: float = 5.0) -> None:
        self.stream, self.seconds = stream, seconds
        self._last = 0.0

    def _print(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    def start(self, total: int, facts: dict[str, Any]) -> None:
        """One line a fact, then the number of steps."""
        for name, value in facts.items():
            self._print(f"{name}: {value}")
        self._print(f"training for {total} steps")

    def step(self, values: dict[str, Any]) -> None:
        """The step's line, unless one was printed a moment ago; the last step and an evaluation always have one."""
        now = time.monotonic()
        held = values.get("eval_loss")
        if now - self._last < self.seconds and values["step"] != values.get("total") and held is None:
            return
        self._last = now
        self._print(
            f"step {values['step']}/{values.get('total', '?')}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{values['tokens_per_second']:.0f} tokens/s  peak {values['peak_memory'] / 2**30:.2f} GiB  "
            f"{_clock(values['eta'])} left" + ("" if held is None else f"  held-out loss {held:.4f}")
        )

    def event(self, text: str) -> None:
        """The sentence as it is."""
        self._print(text)

    def end(self, record: dict[str, Any]) -> None:
        """Held-out loss before and after, time, speed, warnings."""
        held = record.get("held_out") or {}
        if held.get("after") is not None:
            self._print(f"held-out loss {held['before']:.4f} before, {held['after']:.4f} after")
        self._print(
            f"{record['steps']} steps in {_clock(record['seconds'])}, {record['tokens_per_second']:.0f} tokens/s, "
            f"peak {record['peak_memory'] / 2**30:.2f} GiB"
        )
        for warning in record.get("warnings", []):
            self._print(f"warning: {warning}")

    def close(self) -> None:
        """Nothing is held open."""


def chosen(display: Display | bool | None) -> Display:
    """The display itself; plain lines for None and True; silence for False."""
    if display is None or display is True:
        return Lines()
    return Silent() if display is False else display


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
