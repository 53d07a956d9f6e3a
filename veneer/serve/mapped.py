"""Weights that are mapped from their file: which they are, and giving their memory back once they have been copied."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

SMAPS, STATM = Path("/proc/self/smaps"), Path("/proc/self/statm")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")
_AWAY = getattr(mmap, "MADV_DONTNEED", None)


class Range(NamedTuple):
    """Addresses of a part of a file in memory, nothing in which was changed."""

    start: int
    stop: int


def ranges(tensors: Iterable[Tensor]) -> list[Range]:
    """The unchanged mappings of files in which the tensors lie; none where the system does not tell."""
    if _AWAY is None or not SMAPS.is_file():
        return []
    at = {t.data_ptr() for t in tensors if t.device.type == "cpu"}
    found, last = [], None
    for line in SMAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        if head := _HEAD.match(line):
            start, stop, inode = int(head[1], 16), int(head[2], 16), int(head[3])
            last = Range(start, stop) if inode and any(start <= p < stop for p in at) else None
        elif last is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            found.append(last)
    return found


def within(tensor: Tensor, found: Iterable[Range]) -> bool:
    """Whether a tensor lies in one of the ranges."""
    return any(start <= tensor.data_ptr() < stop for start, stop in found)


def give_back(tensors: Iterable[Tensor]) -> None:
    """Take the tensors' files out of memory; what is touched again is read again. Changed pages are left alone."""
    library = ctypes.CDLL(None, use_errno=True)
    for start, stop in ranges(tensors):
        library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _AWAY)


def resident() -> int | None:
    """Bytes of memory this process has taken; None where the system does not tell."""
    if not STATM.is_file():
        return None
    return int(STATM.read_text(encoding="utf-8").split()[1]) * mmap.PAGESIZE
