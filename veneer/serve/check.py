"""What will fit: the memory of base, adapters and requests, before anything is served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from veneer.errors import UserError
from veneer.serve.cache import Batch, Piece
from veneer.serve.layout import Layout
from veneer.serve.mapped import resident
from veneer.serve.product import RUN, Run
from veneer.serve.product import Plan as Product
from veneer.serve.sampling import likeliest
from veneer.serve.sizes import numbers
from veneer.serve.source import Reader, adapter_files, folders
from veneer.serve.trunk import Trunk
from veneer.train.modes import trim

MEGA = 1e6
KINDS = 4  # layouts of adapters that are rehearsed


@dataclass(frozen=True)
class Plan:
    """What a pool of ``pages`` pages holds. ``sizes`` are pages an adapter, with how many are of that size.

    ``work_bytes`` is what steps of all sizes took in memory when they were rehearsed; None where it was not seen.
    """

    weight_bytes: int
    work_bytes: int | None
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
        """Bytes of base, steps and pool."""
        return self.weight_bytes + (self.work_bytes or 0) + self.pages * self.page_bytes

    def lines(self, batch: int, length: int, libraries: int | None = None) -> list[str]:
        """In words, for ``batch`` requests of ``length`` tokens; ``libraries``: bytes taken before the base came."""
        need = batch * -(-length // self.tokens)
        left = self.pages - need
        largest = max(self.sizes, default=0)
        found = [] if libraries is None else [f"libraries     {libraries / MEGA:10,.1f} MB"]
        found.append(f"base          {self.weight_bytes / MEGA:10,.1f} MB")
        if self.work_bytes is not None:
            found.append(
                f"steps         {self.work_bytes / MEGA:10,.1f} MB  kernels of the CPU's library, what is on its way"
            )
        found += [
            f"pool          {self.pages * self.page_bytes / MEGA:10,.1f} MB  "
            f"{self.pages} pages of {self.tokens} tokens",
            f"together      {(self.total_bytes + (libraries or 0)) / MEGA:10,.1f} MB",
            f"requests      {need * self.page_bytes / MEGA:10,.1f} MB  {batch} at once, {length} tokens each",
        ]
        for size, count in sorted(self.sizes.items()):
            found.append(f"adapters      {size * self.page_bytes / MEGA:10,.2f} MB  each of {count} ({size} pages)")
        if not self.sizes and not self.refused:
            found.append("adapters            none was found")
        if self.sizes:
            fits = min(self.adapters, max(0, left) * self.adapters // max(1, self.all_pages))
            found.append(f"resident      {fits} of {self.adapters} adapters fit beside these requests")
        if left < largest:
            found.append(f"it does not fit: {need} pages for requests and {largest} for one adapter, of {self.pages}")
        found += [f"refused       {name}: {why}" for name, why in sorted(self.refused.items())]
        return found


def check(trunk: Trunk, root: Path | None, pages: int, batch: int = 32, chunk: int = 256, tokens: int = 16) -> Plan:
    """Look at every adapter in ``root``; one of each size of file is read, the others are taken to be like it.

    Steps of up to ``batch`` requests and ``chunk`` prompt tokens are rehearsed, without the pool.
    """
    reader, sizes, refused = Reader(trunk), Counter[int](), {}
    known: dict[tuple, int] = {}
    kinds: list[tuple[Layout, torch.Tensor]] = []
    size = 2 * tokens * trunk.cell
    for folder in folders(root) if root is not None else ():
        files = adapter_files(folder)
        try:
            mark = tuple(f.stat().st_size for f in files)
            if mark not in known:
                pieces = reader.read(folder).pieces
                layout = Layout.of(pieces, trunk.groups)
                known[mark] = layout.pages(size)
                if len(kinds) < KINDS and all(layout != other for other, _ in kinds):
                    kinds.append((layout, layout.pack(pieces, size, trunk.dtype)))
            sizes[known[mark]] += 1
        except (UserError, OSError) as error:
            refused[folder.name] = str(error)
    work = rehearse(trunk, batch, chunk, kinds, tokens)
    trim()  # the pages that the rehearsal wrote
    return Plan(trunk.weight_bytes, work, trunk.page_bytes(tokens), pages, tokens, dict(sizes), refused)


@torch.inference_mode()
def rehearse(
    trunk: Trunk, batch: int, chunk: int, kinds: Sequence[tuple[Layout, torch.Tensor]] = (), tokens: int = 16
) -> int | None:
    """Bytes that steps of all sizes take beside base and pool, with adapters of such ``kinds``; None: not seen.

    A library's kernels stay once they are made, and the heap keeps the room of the largest step.
    """
    length = min(512, trunk.longest)
    prompts = numbers(chunk + batch) if trunk.packs else [chunk + batch]
    singles = numbers(batch) if trunk.packs else [batch]
    longest = -(-max(*prompts, length) // tokens)
    pool = trunk.pool(longest + 1 + sum(layout.pages(2 * tokens * trunk.cell) for layout, _ in kinds), tokens)
    begin = most = resident()
    if begin is None:
        return None
    own, mixes = pool.alloc(longest), [()]
    for layout, packed in kinds:
        pages = pool.alloc(packed.shape[1])
        for layer, numbered in zip(pool.data, packed):
            layer[pages] = numbered.to(layer.device)
        mixes.append(((layout.tables(pages, pool.size), 1.0),))
    for mix in mixes:
        steps = [([Piece([0], length - 1, own)] * n, [], []) for n in singles]
        steps += [([], [Piece([0] * n, 0, own)], [Run(0, n, mix)]) for n in prompts if RUN <= n <= trunk.longest]
        for lone, parts, runs in steps:
            rows = Batch(pool, lone, parts, None if lone else [len(parts[0].tokens) - 1], trunk.filled)
            plan = Product(pool, trunk.groups.chunk, [mix] * len(lone), runs, trunk.filled)
            likeliest(trunk.logits(rows, plan, pool))
            most = max(most, resident() or 0)
    return most - begin


def pages_of(trunk: Trunk, memory: int, tokens: int = 16) -> int:
    """Pages of a pool of ``memory`` bytes; raises UserError when that is less than a request's worth."""
    pages = memory // trunk.page_bytes(tokens)
    if pages < 8:
        raise UserError(
            f"--memory {memory / 1e9:g} GB holds {pages} pages of {trunk.page_bytes(tokens) / MEGA:.2f} MB; give more"
        )
    return int(pages)
