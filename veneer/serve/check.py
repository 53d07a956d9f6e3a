"""What will fit: the memory of base, adapters and requests, before anything is served."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from veneer.errors import UserError
from veneer.serve.layout import Layout
from veneer.serve.source import Reader, adapter_files, folders
from veneer.serve.trunk import Trunk

MEGA = 1e6


@dataclass(frozen=True)
class Plan:
    """What a pool of ``pages`` pages holds. ``sizes`` are pages an adapter, with how many are of that size."""

    weight_bytes: int
    page_bytes: int
    pages: int
    tokens: int
    sizes: dict[int, int]
    refused: dict[str, str]

    @property
    def adapters(self) -> int:
        """Adapters in the folder that can be served."""
        return sum(self.sizes.values())

    @property
    def all_pages(self) -> int:
        """Pages of all adapters together."""
        return sum(size * count for size, count in self.sizes.items())

    @property
    def total_bytes(self) -> int:
        """Bytes of base and pool."""
        return self.weight_bytes + self.pages * self.page_bytes

    def lines(self, batch: int, length: int) -> list[str]:
        """In words, for ``batch`` requests of ``length`` tokens."""
        need = batch * -(-length // self.tokens)
        left = self.pages - need
        largest = max(self.sizes, default=0)
        found = [
            f"base          {self.weight_bytes / MEGA:10,.1f} MB",
            f"pool          {(self.total_bytes - self.weight_bytes) / MEGA:10,.1f} MB  "
            f"{self.pages} pages of {self.tokens} tokens",
            f"together      {self.total_bytes / MEGA:10,.1f} MB",
            f"requests      {need * self.page_bytes / MEGA:10,.1f} MB  {batch} at once, {length} tokens each",
        ]
        for size, count in sorted(self.sizes.items()):
            found.append(f"adapters      {size * self.page_bytes / MEGA:10,.2f} MB  each of {count} ({size} pages)")
        if self.sizes:
            fits = min(self.adapters, max(0, left) * self.adapters // max(1, self.all_pages))
            found.append(f"resident      {fits} of {self.adapters} adapters fit beside these requests")
        if left < largest:
            found.append(f"it does not fit: {need} pages for requests and {largest} for one adapter, of {self.pages}")
        found += [f"refused       {name}: {why}" for name, why in sorted(self.refused.items())]
        return found


def check(trunk: Trunk, root: Path | None, pages: int, tokens: int = 16) -> Plan:
    """Look at every adapter in ``root``; one of each size of file is read, the others are taken to be like it."""
    reader, sizes, refused = Reader(trunk), Counter[int](), {}
    known: dict[tuple, int] = {}
    size = 2 * tokens * trunk.cell
    for folder in folders(root) if root is not None else ():
        files = adapter_files(folder)
        try:
            mark = tuple(f.stat().st_size for f in files)
            if mark not in known:
                known[mark] = Layout.of(reader.read(folder).pieces, trunk.groups).pages(size)
            sizes[known[mark]] += 1
        except (UserError, OSError) as error:
            refused[folder.name] = str(error)
    return Plan(trunk.weight_bytes, trunk.page_bytes(tokens), pages, tokens, dict(sizes), refused)


def pages_of(trunk: Trunk, memory: int, tokens: int = 16) -> int:
    """Pages of a pool of ``memory`` bytes; raises UserError when that is less than a request's worth."""
    pages = memory // trunk.page_bytes(tokens)
    if pages < 8:
        raise UserError(
            f"--memory {memory / 1e9:g} GB holds {pages} pages of {trunk.page_bytes(tokens) / MEGA:.2f} MB; give more"
        )
    return int(pages)
