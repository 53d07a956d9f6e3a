"""NLoRA: start three factors at rows, columns and a corner of W."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.hook import Init
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.landmarks import Choice, landmarks
from veneer.numerics.solve import nystrom
from veneer.parts.evidence import Evidence


@method("nlora", axis="init", paper="arXiv:2502.14482", system=9, wants=("core",), defaults="slora")
class NLoRA(Init):
    """The factors of ΔW = s·B·N·A start at W's own columns, corner and rows, as in Nyström's approximation.

    A₀ = W[I, :], B₀ = W[:, J], N₀ = W[I, J], y = x(W − s·B₀N₀A₀)ᵀ + b + s·((xAᵀ)Nᵀ)Bᵀ (Guo et al. 2025, §3.2), I and J
    being the first r rows and columns.

    =================  =========  ==============  =======================================
    tensor             shape      trained         start
    =================  =========  ==============  =======================================
    A                  (r, in)    as the form     W[I, :]
    N                  (r, r)     as the form     W[I, J], or its damped pseudo-inverse
    B                  (out, r)   as the form     W[:, J]
    offset A₀, B₀N₀    as A, B    no              copies, saved with the adapter
    =================  =========  ==============  =======================================

    No decomposition, only copies. Nyström's approximation has the pseudo-inverse of the corner in the middle
    (``core="pinv"``: then s = 1 reproduces the chosen rows and columns of W); the official code has that line commented
    out and takes the corner as it is, the default here.

    The official code leaves W alone and so starts at W + s·B₀N₀A₀, off by about r·w³ for entries of size w: a few per
    cent of the weights of a 7B model, and ruin for SmolLM2-135M (a loss of 13.9 from 2.0 at r = 16). With ``residual``,
    the default, the frozen product is subtracted. The start depends on the order of rows and columns; ``choice`` takes
    others. The paper has r = α = 128 and a rate of 2e-4; steps of the product grow with r·w². Dropout is refused, as it
    would drop parts of W.
    """

    residual: Annotated[bool, At(doc="subtract what the factors start at, so that the start is the base")] = True
    core: Annotated[Literal["block", "pinv"], At(doc="whether N is the corner or its pseudo-inverse")] = "block"
    choice: Annotated[Choice, At(doc="which rows and columns of W")] = "first"

    @property
    def offset(self) -> bool:
        """Whether what the factors start at is subtracted."""
        return self.residual

    def start(
        self, site: Site, slots: list[Any], evidence: Evidence | None, generator: torch.Generator
    ) -> dict[str, Tensor]:
        delta = self.delta
        if getattr(delta, "dropout", 0.0):
            raise UserError(f"nlora with dropout={delta.dropout} would drop parts of W; leave dropout at 0")
        W, rank = site.weight().float(), next(s.shape[0] for s in slots if s.role == "core")
        if rank > min(W.shape):
            raise UserError(f"nlora: rank={rank} is more than {site.path} has rows or columns, {min(W.shape)}")
        rows, columns = landmarks(W, rank, self.choice, generator)
        B, N, A = nystrom(W, rows, columns)
        return {"factor_a": A, "core": N if self.core == "pinv" else A[:, columns], "factor_b": B}
