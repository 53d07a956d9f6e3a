"""The paged pool: one free list for what requests remember and for the factors of adapters.

A page is one id that covers the same place in every layer's tensor. There it holds the keys and then the values of
``tokens`` positions, or as many numbers of an adapter's factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import UserError


class OutOfPages(Exception):
    """The pool has fewer free pages than were asked for."""


class PagePool:
    """``pages`` pages of ``2 · tokens · cell`` numbers in each of ``layers`` tensors.

    Args:
        cell: the keys of one position, ``key-value heads · head_dim`` numbers.
        tokens: positions a page.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        cell: int,
        tokens: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if pages < 2:
            raise UserError(f"the pool has room for {pages} pages; give it more memory (--memory)")
        self.cell, self.tokens, self.pages = cell, tokens, pages
        self.size = 2 * tokens * cell
        self.data = [torch.zeros(pages, self.size, dtype=dtype, device=device) for _ in range(layers)]
        self._free = list(range(pages - 1, -1, -1))
        self._held = bytearray(pages)
        self._views: dict[int, list[Tensor]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.size * self.data[0].element_size() * len(self.data)

    def alloc(self, count: int) -> list[int]:
        """``count`` free pages, anywhere; raises OutOfPages and takes none when there are fewer."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages were asked for and {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._held[page] = 1
        return taken

    def release(self, pages: list[int]) -> None:
        """Give pages back; each must be held."""
        for page in pages:
            assert self._held[page], f"page {page} is given back twice"
            self._held[page] = 0
        self._free.extend(pages)

    def rows(self, width: int) -> list[Tensor]:
        """Each layer's tensor as rows of ``width`` numbers, which must divide a page."""
        if width not in self._views:
            assert self.size % width == 0, f"rows of {width} do not fill a page of {self.size}"
            self._views[width] = [t.view(-1, width) for t in self.data]
        return self._views[width]

    def blocks(self) -> list[Tensor]:
        """Each layer's tensor as half pages: ``2p`` holds the keys of page ``p``, ``2p + 1`` its values."""
        return self.rows(self.tokens * self.cell)
