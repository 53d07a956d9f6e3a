"""Signals that ask a run to stop: the step under way is finished and a checkpoint written first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupted(SystemExit):
    """The run was asked to stop and did so; ``code`` is the exit status (130 for SIGINT, 143 for SIGTERM)."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(128 + number)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Interrupts:
    """While entered, SIGINT and SIGTERM are noted in ``received``; a second one acts at once, as it would have.

    Only the main thread can receive signals; elsewhere nothing is changed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()
