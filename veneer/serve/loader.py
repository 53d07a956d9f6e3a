"""The thread that reads adapters, so that decoding does not wait for files."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from veneer.errors import UserError
from veneer.serve.route import Packed
from veneer.serve.source import Reader


@dataclass
class Loaded:
    """What came of reading an entry's folder: its numbers ready for pages, or one sentence."""

    entry: Any
    packed: Packed | None = None
    error: str | None = None


class Loader:
    """Reads in the order of asking.

    Args:
        reader, size, dtype: how numbers are laid out for the pool.
        threaded: False reads at once, in the caller's thread.
        notify: called, in the loader's thread, when something has been read.
    """

    def __init__(
        self,
        reader: Reader,
        size: int,
        dtype: torch.dtype,
        threaded: bool = True,
        notify: Callable[[], None] | None = None,
    ) -> None:
        self.reader, self.size, self.dtype = reader, size, dtype
        self.notify, self.threaded = notify, threaded
        self._asked: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._read: deque[Loaded] = deque()
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="veneer-loader", daemon=True)
            threads, begun = torch.get_num_threads(), threading.Event()
            self._begun = begun.set
            self._thread.start()
            begun.wait()
            torch.set_num_threads(threads)  # what threads that begin later take over

    def ask(self, entry: Any) -> None:
        """Read an entry's folder soon."""
        if self._thread is None:
            self._read.append(self.read(entry))
        else:
            self._asked.put(entry)

    def done(self) -> list[Loaded]:
        """What has been read since the last call, and what was put back."""
        found = []
        while self._read:
            found.append(self._read.popleft())
        return found

    def put_back(self, loaded: Loaded) -> None:
        """Keep it for the next ``done``: there was no room."""
        self._read.append(loaded)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(timeout=5)
            self._thread = None

    def read(self, entry: Any) -> Loaded:
        """Read and lay out one entry."""
        try:
            packed = self.reader.packed(entry.folder, self.size, self.dtype)
        except UserError as error:
            return Loaded(entry, error=str(error))
        except Exception as error:  # a library's, from a file that others wrote: the server goes on
            said = " ".join(str(error).split())[:200]
            return Loaded(entry, error=f"the adapter {entry.name!r} cannot be read: {said}")
        return Loaded(entry, packed)

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread: the others are for the engine's products
        self._begun()
        while (entry := self._asked.get()) is not None:
            self._read.append(self.read(entry))
            if self.notify is not None:
                self.notify()
