"""One request on its way through the server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.serve.sampling import Sampling

_numbers = itertools.count()

Blend = tuple[tuple[str, float], ...]


@dataclass(eq=False)
class Request:
    """What was asked, and how far it is.

    Args:
        prompt: token ids, at least one.
        blend: (adapter, weight) pairs; empty is the base.
        limit: most tokens to generate, O.
        arrival: when it came, in seconds of the engine's clock.
        sink: called in the engine's thread with every `Event`.
    """

    prompt: Sequence[int]
    blend: Blend = ()
    limit: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    arrival: float = 0.0
    stops: frozenset[int] = frozenset()
    sink: Callable[[Any], None] | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    def __post_init__(self) -> None:
        self.generated: list[int] = []
        self.pages: list[int] = []
        self.known = 0  # positions whose keys and values are in the pool
        self.entries: tuple[Any, ...] = ()
        self.mix: tuple = ()
        self.first: float | None = None
        self.finished: float | None = None
        self.reason: str | None = None
        self.reused = 0
        self.cancelled = False
        self.enough = False  # cancelled by a stop string, which ends it as it should

    @property
    def adapter(self) -> Blend:
        """What schedulers tell requests apart by."""
        return self.blend

    @property
    def length(self) -> int:
        """Prompt tokens and generated ones."""
        return len(self.prompt) + len(self.generated)

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.limit - len(self.generated)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Prompt and generated tokens [start, stop)."""
        cut = len(self.prompt)
        own = list(self.prompt[start : min(stop, cut)]) if start < cut else []
        return own + self.generated[max(0, start - cut) : max(0, stop - cut)]


@dataclass(frozen=True)
class Event:
    """A token of a request, or its end (``reason``: stop, length, cancelled, aborted, error)."""

    request: Request
    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    reason: str | None = None
    detail: str = ""
