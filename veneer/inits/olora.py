"""OLoRA: start the factors at an orthonormal basis of W's first columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.hook import Init
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.parts.evidence import Evidence

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method("olora", axis="init", paper="arXiv:2406.01775", system=0, wants=("pair",), defaults="lora")
class OLoRA(Init):
    """B starts at r orthonormal columns and A at W seen from them; their product leaves the frozen weight.

    W = QR, B₀ = Q[:, :r], A₀ = R[:r], y = x(W − s·B₀A₀)ᵀ + b + s·xAᵀBᵀ (Büyükakyüz 2024, algorithm 1).

    ==============  =========  =========  =============================================
    tensor          shape      trained    start
    ==============  =========  =========  =============================================
    A               (r, in)    yes        the first r rows of R
    B               (out, r)   yes        the first r columns of Q
    offset A₀, B₀   as A, B    no         copies of A and B, saved with the adapter
    ==============  =========  =========  =============================================

    No hyper-parameters of its own; with s ≠ 1 what moves is s·B₀A₀, as in PEFT.

    Without pivoting Q[:, :r] spans the first r columns of W, whichever these are: the start depends on the order of the
    inputs, and all of the other columns take part by projection only. So one QR of those r columns is enough here, with
    R[:r] = Q[:, :r]ᵀW, where PEFT decomposes the whole of W. PEFT also writes W − s·B₀A₀ into the layer, and at a
    Conv1D decomposes the transposed weight; here W is not written, and every layer is taken in the dense view. Dropout
    is refused: it would drop parts of W.
    """

    offset = True
    room: Tensor | None = None  # one for all layers: copies that come and go leave holes between what stays

    def start(
        self, site: Site, slots: list[Any], evidence: Evidence | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        delta = self.delta
        if getattr(delta, "dropout", 0.0):
            raise UserError(f"olora with dropout={delta.dropout} would drop parts of W; leave dropout at 0")
        W, rank = self._wide(site.weight()), next(s.shape[0] for s in slots if s.role == "factor_a")
        if rank > min(W.shape):
            raise UserError(f"olora: rank={rank} is more than {site.path} has rows or columns, {min(W.shape)}")
        Q = torch.linalg.qr(W[:, :rank]).Q
        return {"factor_a": Q.T @ W, "factor_b": Q}

    def on_attach(self, adapter: Adapter) -> None:
        self.room = None

    def _wide(self, W: Tensor) -> Tensor:
        """W in fp32, valid until the next call."""
        if W.dtype == torch.float32:
            return W
        if self.room is None or self.room.numel() < W.numel() or self.room.device != W.device:
            self.room = torch.empty(W.numel(), device=W.device)
        return self.room[: W.numel()].view(W.shape).copy_(W)
