"""The adapters that are known, and those whose factors are in the pool.

An adapter is a folder that was registered under a name. Its factors come into pages when a request needs them, stay
while requests use them or it is pinned, and leave when the pages are needed. Replacing one makes a new version:
requests that run finish on the old one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from veneer.errors import UserError, nearest
from veneer.serve.layout import Layout, Table
from veneer.serve.loader import Loaded, Loader
from veneer.serve.policies.eviction import least_recent
from veneer.serve.pool import OutOfPages, PagePool
from veneer.serve.source import stamp

State = Literal["absent", "loading", "ready", "failed"]
_versions = itertools.count(1)


@dataclass(eq=False)
class Entry:
    """One version of one adapter."""

    name: str
    folder: Path
    stamp: Any = None
    state: State = "absent"
    pinned: bool = False
    users: int = 0
    used: float = 0.0
    came: float = 0.0
    rate: float = 0.0
    size: int = 1
    form: str = ""
    rank: int = 0
    error: float = 0.0
    why: str = ""
    gone: bool = False

    def __post_init__(self) -> None:
        self.version = next(_versions)
        self.pages: list[int] = []
        self.tables: dict[str, Table] = {}


class Bank:
    """Registers adapters, and keeps them in the pool while they are worth it.

    All methods are called by the engine's thread; ``loader`` reads files in its own.

    Args:
        spare: called with a number of pages when the pool is short of them; frees what else can be freed.
        evict: the order in which idle adapters leave.
        most: how many adapters may be registered.
    """

    def __init__(
        self,
        pool: PagePool,
        loader: Loader,
        spare: Callable[[int], int] = lambda count: 0,
        evict: Callable[[Sequence[Entry], float], list[Entry]] = least_recent,
        most: int = 100_000,
    ) -> None:
        self.pool, self.loader, self.spare, self.order, self.most = pool, loader, spare, evict, most
        self.entries: dict[str, Entry] = {}
        self.old: list[Entry] = []
        self.turn: dict[Entry, int] = {}  # who waits for which adapter: 0 is the head of the queue
        self.loads = self.evictions = self.hits = self.misses = 0
        self.bytes_loaded = 0

    # -- what is known

    def add(self, name: str, folder: Path, pinned: bool = False) -> Entry:
        """Register the adapter in ``folder``, or a new version of it; raises UserError at the limit."""
        if name not in self.entries and len(self.entries) >= self.most:
            raise UserError(f"{self.most} adapters are registered already; remove one first")
        before = self.entries.get(name)
        entry = Entry(name, folder, stamp(folder), pinned=pinned or (before is not None and before.pinned))
        self.entries[name] = entry
        if before is not None:
            self._retire(before)
        return entry

    def remove(self, name: str) -> None:
        """Forget an adapter; its running requests finish."""
        self._retire(self.get(name))
        del self.entries[name]

    def get(self, name: str) -> Entry:
        """The newest version; raises UserError for a name that is not registered."""
        if name not in self.entries:
            raise UserError(f"there is no model or adapter {name!r} here{nearest(name, self.entries)}")
        return self.entries[name]

    # -- what is in the pool

    def take(self, names: Iterable[str], now: float) -> list[Entry] | None:
        """The ready entries of ``names``, each with one more user; None, and loading begun, when one is not ready yet.

        Raises UserError for an adapter that cannot be served.
        """
        entries = [self.get(name) for name in names]
        ready = True
        for e in entries:
            ready &= self.want(e, now)
        if not ready:
            return None
        for e in entries:
            e.users += 1
            e.used = now
        return entries

    def want(self, entry: Entry, now: float) -> bool:
        """Whether it is ready; begins loading if nothing does. Raises UserError when it could not be loaded."""
        if entry.state == "failed":
            raise UserError(entry.why)
        entry.used = now
        if entry.state == "absent":
            entry.state = "loading"
            self.misses += 1
            self.loader.ask(entry)
        return entry.state == "ready"

    def seen(self, entry: Entry, now: float) -> None:
        """Count an arrival for an adapter: a running average of its rate, with a minute's memory."""
        gap = max(1e-3, now - entry.came) if entry.came else 60.0
        entry.rate += min(1.0, gap / 60.0) * (1 / gap - entry.rate)
        entry.came = now
        self.hits += entry.state == "ready"

    def give(self, entries: Iterable[Entry], now: float) -> None:
        """The users of ``take`` are done."""
        for e in entries:
            e.users -= 1
            e.used = now
            if e.gone and not e.users:
                self._drop(e)
                self.old.remove(e)

    def settle(self, now: float) -> bool:
        """Put what the loader has read into pages, as far as there are any; whether the head of the queue lacks some.

        One that is read ahead does not drive out an adapter for which someone waits longer (``turn``).
        """
        short = False
        for loaded in self.loader.done():
            entry = loaded.entry
            if entry.gone and not entry.users:
                entry.state = "absent"
                continue
            if loaded.error is not None:
                entry.state, entry.why = "failed", loaded.error
                continue
            need, last = loaded.packed.layout.pages(self.pool.size), len(self.turn)
            if need > self.pool.pages // 2:
                entry.state = "failed"
                entry.why = (
                    f"the adapter {entry.name!r} needs {need} pages, more than half of the pool's {self.pool.pages}; "
                    "start the server with more --memory"
                )
                continue
            mine = self.turn.get(entry, last)
            try:
                pages = self.room(need, now, {e for e, turn in self.turn.items() if turn < mine})
            except OutOfPages:
                self.loader.put_back(loaded)
                short |= mine == 0
                continue
            self._fill(entry, loaded, pages)
        return short

    def room(self, count: int, now: float, keep: Iterable[Entry] = ()) -> list[int]:
        """``count`` pages, idle prefixes and then idle adapters making way; raises OutOfPages if they are too few."""
        if count > self.pool.free:
            self.spare(count - self.pool.free)
        if count > self.pool.free:
            idle = [
                e
                for e in self.entries.values()
                if e.state == "ready" and not e.users and not e.pinned and e not in keep
            ]
            if count > self.pool.free + sum(len(e.pages) for e in idle):
                raise OutOfPages(f"{count} pages are needed and {self.pool.free} are free")
            for e in self.order(idle, now):
                self._drop(e)
                self.evictions += 1
                if count <= self.pool.free:
                    break
        return self.pool.alloc(count)

    @property
    def held(self) -> int:
        """Pages of adapters that are in use or pinned."""
        return sum(len(e.pages) for e in (*self.entries.values(), *self.old) if e.users or e.pinned)

    @property
    def resident(self) -> int:
        """Adapters in the pool."""
        return sum(e.state == "ready" for e in (*self.entries.values(), *self.old))

    def evict(self, name: str) -> None:
        """Take an idle adapter out of the pool."""
        entry = self.get(name)
        if entry.state == "ready" and not entry.users:
            self._drop(entry)
            self.evictions += 1

    def _fill(self, entry: Entry, loaded: Loaded, pages: list[int]) -> None:
        index = torch.tensor(pages, device=self.pool.data[0].device)
        packed = loaded.packed
        for layer, numbers in zip(self.pool.data, packed.layers):
            layer.index_copy_(0, index, numbers.to(layer.device))
        entry.pages, entry.size, entry.state = pages, len(pages), "ready"
        entry.form, entry.rank, entry.error = packed.form, packed.rank, packed.error
        entry.tables = packed.layout.tables(pages, self.pool.size)
        self.loads += 1
        self.bytes_loaded += packed.bytes
        packed.done()

    def _drop(self, entry: Entry) -> None:
        self.pool.release(entry.pages)
        entry.pages, entry.tables = [], {}
        entry.state = "absent"

    def _retire(self, entry: Entry) -> None:
        entry.gone = True
        if entry.users:
            self.old.append(entry)
        elif entry.state == "ready":
            self._drop(entry)


def bytes_of(layout: Layout, pool: PagePool) -> int:
    """Bytes that an adapter takes in the pool."""
    return layout.pages(pool.size) * pool.page_bytes


def unpacked(entry: Entry, pool: PagePool) -> Tensor:
    """An entry's numbers as they lie in the pool, (layers, pages, size)."""
    return torch.stack([layer[entry.pages] for layer in pool.data])
