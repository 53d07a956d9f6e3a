"""Pages that several requests share: the keys and values of a common beginning under the same adapter.

A full page is known by what acts on it (the blend and the versions of its adapters) and all tokens up to its end. A
page nobody uses stays until the room is needed; the longest unused goes first, ends of chains before beginnings.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from veneer.serve.pool import PagePool


class Prefixes:
    """The shared pages of a pool. A request's page is either its own or in here, counted once for each user."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._page: dict[Hashable, int] = {}
        self._key: dict[int, Hashable] = {}
        self._users: dict[int, int] = {}
        self._children: dict[int, int] = {}
        self._parent: dict[int, int | None] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def idle(self) -> int:
        """Pages that are kept and used by nobody."""
        return len(self._idle)

    def find(self, mark: Hashable, tokens: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of ``tokens``; each is in use from now on until given back."""
        found: list[int] = []
        size = self.pool.tokens
        key = mark
        for start in range(0, len(tokens) - size + 1, size):
            key = chained(key, tokens[start : start + size])
            if key not in self._page:
                break
            found.append(self._page[key])
        for page in found:
            self._users[page] += 1
            self._idle.pop(page, None)
        return found

    def keep(self, mark: Hashable, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Give back a request's ``pages``, of which those filled by ``tokens`` are kept for others."""
        size = self.pool.tokens
        key = mark
        parent: int | None = None
        spare: list[int] = []
        for at, page in enumerate(pages):
            full = (at + 1) * size <= len(tokens)
            if full:
                key = chained(key, tokens[at * size : (at + 1) * size])
            if page in self._users:
                self._release(page)
                parent = page
            elif full and key not in self._page:
                self._page[key], self._key[page], self._users[page] = page, key, 0
                self._parent[page], self._children[page] = parent, 0
                if parent is not None:
                    self._children[parent] += 1
                self._idle[page] = None
                parent = page
            else:
                spare.append(page)
                parent = self._page.get(key) if full else None
        self.pool.release(spare)

    def evict(self, count: int) -> int:
        """Free up to ``count`` idle pages; returns how many."""
        gone = 0
        while gone < count and self._idle:
            page = next((p for p in self._idle if not self._children[p]), None)
            if page is None:
                break
            self._forget(page)
            gone += 1
        return gone

    def _release(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            self._idle[page] = None
            self._idle.move_to_end(page)

    def _forget(self, page: int) -> None:
        del self._idle[page], self._users[page], self._children[page]
        del self._page[self._key.pop(page)]
        parent = self._parent.pop(page)
        if parent is not None and parent in self._children:
            self._children[parent] -= 1
        self.pool.release([page])


def chained(before: Hashable, tokens: Sequence[int]) -> Hashable:
    """The key of a page: a digest of what came before it and its tokens."""
    return hashlib.blake2b(repr((before, list(tokens))).encode(), digest_size=16).digest()
