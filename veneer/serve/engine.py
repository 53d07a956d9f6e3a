"""The engine: takes requests in, admits them, and runs one step after another over all that are under way.

A step is one forward pass: one token for each request that decodes, and up to ``chunk`` tokens of prompts. Everything
here happens in one thread; other threads may call `submit`, `cancel` and `do`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.errors import UserError
from veneer.serve.admission import Room
from veneer.serve.bank import Bank
from veneer.serve.cache import Batch, Piece
from veneer.serve.loader import Loader
from veneer.serve.policies.eviction import EVICTION
from veneer.serve.policies.fcfs import FCFS
from veneer.serve.policies.policy import Policy
from veneer.serve.pool import OutOfPages
from veneer.serve.prefix import Prefixes
from veneer.serve.product import RUN, Mix, Plan, Run
from veneer.serve.request import Event, Request
from veneer.serve.sampling import Choice, choose
from veneer.serve.sizes import whole
from veneer.serve.source import Reader
from veneer.serve.trunk import Trunk


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on.

    Args:
        batch: requests that run at once.
        queue: requests that wait; more are refused.
        chunk: prompt tokens a step.
        prefetch: waiting requests whose adapters are read ahead.
        reuse: whether common beginnings share pages.
    """

    batch: int = 32
    queue: int = 256
    chunk: int = 256
    prefetch: int = 16
    reuse: bool = True


@dataclass
class Totals:
    """What the engine has done since it began."""

    steps: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    requests: int = 0
    refused: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    adapters: int = 0
    preempted: int = 0


class Engine:
    """Serves requests on one base.

    Args:
        trunk: the base.
        pages: pages of ``tokens`` positions each, for requests and adapters together.
        policy: who is served next; first come, first served when None.
        eviction: "lru" or "cost".
        threaded: whether adapters are read in a thread of their own.
    """

    def __init__(
        self,
        trunk: Trunk,
        pages: int,
        *,
        tokens: int = 16,
        policy: Policy | None = None,
        limits: Limits = Limits(),
        eviction: str = "lru",
        threaded: bool = True,
        reader: Reader | None = None,
        clock: Callable[[], float] = time.monotonic,
        notify: Callable[[], None] | None = None,
    ) -> None:
        self.trunk, self.policy, self.limits, self.clock = trunk, policy or FCFS(), limits, clock
        self.pool = trunk.pool(pages, tokens)
        self.prefixes = Prefixes(self.pool)
        loader = Loader(reader or Reader(trunk), self.pool.size, trunk.dtype, threaded, notify)
        self.bank = Bank(self.pool, loader, self.prefixes.evict, EVICTION[eviction])
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.totals = Totals()
        self._inbox: deque[Callable[[], None]] = deque()
        self._plan: tuple[tuple, Plan, list[Mix]] | None = None
        self._notify = notify

    # -- from any thread

    def submit(self, request: Request) -> None:
        """Take a request in; what becomes of it comes to its sink. Raises UserError when it can never run."""
        self.check(request)
        self.do(lambda: self._enter(request))

    def cancel(self, request: Request) -> None:
        """Give up a request: its pages are free before the next step."""
        request.cancelled = True
        self.do(lambda: None)

    def do(self, work: Callable[[], None]) -> None:
        """Run something in the engine's thread before its next step."""
        self._inbox.append(work)
        if self._notify is not None:
            self._notify()

    def check(self, request: Request) -> None:
        """Raise UserError for a request that does not fit the model or the pool."""
        total = len(request.prompt) + request.limit
        if not len(request.prompt):
            raise UserError("the prompt has no tokens; give at least one")
        if request.limit < 1:
            raise UserError(f"max_tokens is {request.limit}; at least 1 was expected")
        if total > self.trunk.longest:
            raise UserError(
                f"{len(request.prompt)} prompt tokens and {request.limit} to generate are more than the "
                f"{self.trunk.longest} positions of the model; shorten the prompt or max_tokens"
            )
        if -(-total // self.pool.tokens) >= self.pool.pages:
            raise UserError(
                f"{total} tokens need more than the {self.pool.pages * self.pool.tokens} that the pool holds; "
                "shorten the prompt or max_tokens, or start the server with more --memory"
            )

    # -- the engine's thread

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._inbox or self.waiting or self.running)

    def step(self) -> bool:
        """Admit whom there is room for and run one pass; False when nothing could be run."""
        while self._inbox:
            self._inbox.popleft()()
        now = self.clock()
        for r in [r for r in (*self.waiting, *self.running) if r.cancelled]:
            self._end(r, "stop" if r.enough else "cancelled")
        if self.waiting:
            self._admit(now)
        if not self.running:
            return False
        try:
            asked, choices = self._pass()
        except OutOfPages:
            self.preempt(self.running[-1])
            return True
        now = self.clock()
        for request, choice in zip(asked, choices):
            self._took(request, choice, now)
        return True

    def run(self, most: int = 1_000_000) -> None:
        """Step until nothing is left to do (for tests and benches without a thread)."""
        for _ in range(most):
            if not self.busy:
                return
            if not self.step() and self.bank.loader.threaded:
                time.sleep(0.0005)
        raise RuntimeError("the engine did not finish")

    def preempt(self, request: Request) -> None:
        """Put a running request back in the queue: its pages and adapter are free, its tokens are computed again."""
        self._leave(request)
        request.known = 0
        self.waiting.insert(0, request)
        self.totals.preempted += 1

    def room(self) -> Room:
        """What the pool has room for now."""
        idle = sum(len(e.pages) for e in self.bank.entries.values() if e.pinned and not e.users)
        return Room(self.pool.pages - idle + 1, self._cost, self.pool.tokens, self.limits.batch, ahead=0)

    def _cost(self, blend: Any) -> list[tuple[Any, int]]:
        return [(e, e.size) for e in (self.bank.entries.get(name) for name, _ in blend) if e is not None]

    def _enter(self, request: Request) -> None:
        now = self.clock()
        request.arrival = request.arrival or now
        self.totals.requests += 1
        try:
            for name, _ in request.blend:
                self.bank.seen(self.bank.get(name), now)
        except UserError as error:
            self._end(request, "error", str(error))
            return
        self.waiting.append(request)

    def _admit(self, now: float) -> None:
        for r in self.policy.hopeless(self.waiting, now):
            self._end(r, "aborted", "it could not have been answered in time")
        ahead = self.policy.order(self.waiting, self.running, now)[: self.limits.prefetch]
        self.bank.turn = turn = {}
        for r in ahead:
            try:
                for name, _ in r.blend:
                    entry = self.bank.get(name)
                    turn.setdefault(entry, len(turn))
                    self.bank.want(entry, now)
            except UserError as error:
                self._end(r, "error", str(error))
        short = self.bank.settle(now)
        if short and self.running:
            return  # an adapter that was read waits for pages: nobody may take them first
        entries = self.bank.entries
        ready = [r for r in self.waiting if all(n in entries and entries[n].state == "ready" for n, _ in r.blend)]
        new = self.policy.select(ready, self.running, self.room(), now) if ready else []
        for r in new:
            self._begin(r, now)
        self.policy.admitted(new, len(self.waiting))

    def _begin(self, request: Request, now: float) -> None:
        taken = self.bank.take([name for name, _ in request.blend], now)
        assert taken is not None, "only requests whose adapters are ready are selected"
        weights = [weight for _, weight in request.blend]
        request.entries = tuple(taken)
        request.mix = tuple((e.tables, w) for e, w in zip(taken, weights))
        request.mark = tuple((e.version, w) for e, w in zip(taken, weights))
        if self.limits.reuse:
            request.pages = self.prefixes.find(request.mark, request.tokens(0, request.length - 1))
        request.known = request.reused = len(request.pages) * self.pool.tokens
        self.totals.reused_tokens += request.reused
        self.waiting.remove(request)
        self.running.append(request)

    def _pass(self) -> tuple[list[Request], list[Choice]]:
        singles = [r for r in self.running if r.length - r.known == 1]
        parts, budget = [], self.limits.chunk
        if sum(r.length - r.known for r in self.running) - len(singles) > budget and self.trunk.packs:
            budget = max(1, whole(len(singles) + budget) - len(singles))  # the rest is for the next step anyway
        for r in self.running:
            if r.length - r.known > 1 and budget > 0:
                parts.append((r, min(budget, r.length - r.known)))
                budget -= parts[-1][1]
        parts.sort(key=lambda p: (p[1] >= RUN, max((e.rank for e in p[0].entries), default=0), p[1]))  # alike, adjacent
        for r, count in [*((r, 1) for r in singles), *parts]:
            need = -(-(r.known + count) // self.pool.tokens) - len(r.pages)
            if need > 0:
                r.pages += self.bank.room(need, self.clock())
        heads = [r.mix for r in singles]
        pieces, runs, asked_rows, asked = [], [], list(range(len(singles))), list(singles)
        at = len(singles)
        for r, count in parts:
            pieces.append(Piece(r.tokens(r.known, r.known + count), r.known, r.pages))
            if count < RUN:
                heads += [r.mix] * count
            else:
                runs.append(Run(at, at + count, r.mix))
            at += count
            if r.known + count == r.length:
                asked_rows.append(at - 1)
                asked.append(r)
        lone = [Piece(r.tokens(r.known, r.length), r.known, r.pages) for r in singles]
        batch = Batch(self.pool, lone, pieces, asked_rows if parts else None, self.trunk.filled)
        logits = self.trunk.logits(batch, self._planned(heads, runs), self.pool)
        for r, count in [*((r, 1) for r in singles), *parts]:
            r.known += count
        self.totals.steps += 1
        self.totals.rows += len(singles)
        self.totals.adapters += len({r.mark for r in singles if r.mark})
        self.totals.prompt_tokens += sum(n for _, n in parts)
        return asked, choose(logits, asked) if asked else []

    def _planned(self, heads: Sequence[Mix], runs: Sequence[Run]) -> Plan:
        """The product's plan; that of the last step while the same adapters act on the same rows."""

        def key(mix: Mix) -> tuple:
            return tuple((id(tables), weight) for tables, weight in mix)

        wanted = (tuple(key(m) for m in heads), tuple((r.start, r.stop, key(r.mix)) for r in runs))
        if self._plan is None or self._plan[0] != wanted:
            plan = Plan(self.pool, self.trunk.groups.chunk, heads, runs, self.trunk.filled)
            self._plan = (wanted, plan, [*heads, *(r.mix for r in runs)])  # held, so that an id stays theirs
        return self._plan[1]

    def _took(self, request: Request, choice: Choice, now: float) -> None:
        if request.first is None:
            request.first = now
        request.generated.append(choice.token)
        self.totals.tokens += 1
        self.policy.served(request, 1)
        reason = "stop" if choice.token in request.stops else "length" if request.left <= 0 else None
        if request.sink is not None:
            request.sink(Event(request, choice.token, choice.logprob, choice.top))
        if reason is not None:
            self._end(request, reason)

    def _end(self, request: Request, reason: str, detail: str = "") -> None:
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.reason, request.finished = reason, self.clock()
        self.totals.reasons[reason] = self.totals.reasons.get(reason, 0) + 1
        if request.sink is not None:
            request.sink(Event(request, reason=reason, detail=detail))

    def _leave(self, request: Request) -> None:
        self.running.remove(request)
        if self.limits.reuse:
            self.prefixes.keep(request.mark, request.tokens(0, request.known), request.pages)
        else:
            self.pool.release(request.pages)
        request.pages = []
        self.bank.give(request.entries, self.clock())
        request.entries, request.mix = (), ()

    def close(self) -> None:
        """End the loader's thread."""
        self.bank.loader.close()
