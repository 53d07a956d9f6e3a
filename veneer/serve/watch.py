"""Follows the adapters' folder: what appears is served, what changes is replaced, what goes is removed."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from veneer.errors import UserError
from veneer.serve.engine import Engine
from veneer.serve.names import inside
from veneer.serve.source import folders, stamp

log = logging.getLogger("veneer.serve")


class Watch:
    """Compares the folder with what is registered; `look` reads the disk and may run anywhere.

    Adapters that were added under another name than their folder's are left alone; none is called as the ``base``.
    """

    def __init__(self, engine: Engine, root: Path, pinned: frozenset[str] = frozenset(), base: str = "") -> None:
        self.engine, self.root, self.pinned, self.base = engine, root, pinned, base
        self._seen: dict[str, Any] = {}
        self._refused: set[str] = set()

    def look(self) -> int:
        """Ask the engine for what has changed; returns how many adapters that concerns."""
        found: dict[str, Any] = {}
        for folder in folders(self.root):
            try:
                if folder.name == self.base:
                    raise UserError("that is the name of the base; call the folder otherwise")
                found[folder.name] = stamp(inside(self.root, folder.name))
            except UserError as error:
                if folder.name not in self._refused:
                    self._refused.add(folder.name)
                    log.warning("%s is not served: %s", folder.name, error)
        changed = [name for name, mark in found.items() if mark is not None and self._seen.get(name) != mark]
        gone = [name for name in self._seen if name not in found]
        for name in changed:
            self.engine.do(lambda name=name: self._put(name))
        for name in gone:
            self.engine.do(lambda name=name: self._drop(name))
        self._seen = {name: mark for name, mark in found.items() if mark is not None}
        return len(changed) + len(gone)

    async def follow(self, every: float = 1.0) -> None:
        """Look every so often, for ever."""
        while True:
            await asyncio.sleep(every)
            try:
                await asyncio.to_thread(self.look)
            except OSError as error:
                log.warning("the adapters' folder cannot be read: %s", error)

    def _put(self, name: str) -> None:
        entry = self.engine.bank.entries.get(name)
        if entry is not None and entry.stamp == stamp(self.root / name) and entry.folder == self.root / name:
            return
        try:
            self.engine.bank.add(name, self.root / name, pinned=name in self.pinned)
        except UserError as error:
            log.warning("%s is not served: %s", name, error)

    def _drop(self, name: str) -> None:
        entry = self.engine.bank.entries.get(name)
        if entry is not None and entry.folder == self.root / name and stamp(entry.folder) is None:
            self.engine.bank.remove(name)
