"""What a scheduling policy is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from veneer.serve.admission import Room


class Policy:
    """Chooses whom to admit. ``order`` is the whole of most policies; the first that does not fit ends an admission."""

    name: ClassVar[str]

    def order(self, waiting: Sequence[Any], running: Sequence[Any], now: float) -> list[Any]:
        """The waiting requests, whom to take first first."""
        raise NotImplementedError

    def select(self, waiting: Sequence[Any], running: Sequence[Any], room: Room, now: float) -> list[Any]:
        """Whom to admit now."""
        new: list[Any] = []
        for request in self.order(waiting, running, now):
            if not room.fits(running, [*new, request]):
                break
            new.append(request)
        return new

    def hopeless(self, waiting: Sequence[Any], now: float) -> list[Any]:
        """Whom to send away, as their deadline cannot be met; called once before each ``select``."""
        return []

    def admitted(self, new: Sequence[Any], waiting: int) -> None:
        """``new`` were admitted and ``waiting`` are left."""

    def served(self, request: Any, tokens: int) -> None:
        """A request got ``tokens`` new tokens."""
