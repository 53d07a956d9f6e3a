"""OFT: rotate what a layer gets, block by block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Slot
from veneer.core.registry import PeftMap, method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import rotations


@method("oft", axis="delta", paper="arXiv:2306.07280", system=0, gives=("linear", "foldable", "frozen-base"))
class OFT(Delta):
    """An orthogonal change: row norms of W and the angles between its rows stay as they are.

    y = (xR)Wᵀ + b with R = blockdiag(R_1 … R_n) over blocks of b inputs, so W′ = WRᵀ;
    R_j = (I − Q_j)(I + Q_j)⁻¹ of a skew-symmetric Q_j (Qiu et al. 2023, §3.3).

    ======  ================  =========  =====
    tensor  shape             trained    start
    ======  ================  =========  =====
    Q       (n, b(b − 1)/2)   yes        0
    ======  ================  =========  =====

    Q holds upper triangles; n is 1 with ``block_share``. Defaults: b = 32 as in PEFT (without decay, rates 1e-4 to
    1e-3). Where b does not divide the layer's inputs the nearest number that does takes its place, as in PEFT.

    R is exactly orthogonal by default. PEFT's default, ``cayley_neumann``, cuts the series of the inverse after
    ``terms`` terms and turns the other way: R ≈ (I + Q)(I − Q)⁻¹, orthogonal up to about 2‖Q‖⁴ and of no meaning for
    ‖Q‖ ≥ 1. ``coft`` bounds the norm of each Q_j by ε/√n; the bound acts on what is used, where PEFT writes it into
    the tensor. Module dropout is left out.

    Backward keeps x and the blocks, n·b². A convolution is rotated in the dense view, inputs × kernel, and W′ is formed
    again in the backward pass; PEFT merges so, but runs with overlapping patches summed.
    """

    block_size: Annotated[int, At(ge=0, doc="b, inputs in a block")] = 32
    blocks: Annotated[int, At(ge=0, doc="n, in place of their size; 0: by size")] = 0
    block_share: Annotated[bool, At(doc="one Q for all blocks of a layer")] = False
    coft: Annotated[bool, At(doc="bound the norm of Q (constrained OFT)")] = False
    eps: Annotated[float, At(gt=0, doc="ε of that bound")] = 6e-5
    cayley_neumann: Annotated[bool, At(doc="PEFT's series in place of the exact rotation")] = False
    terms: Annotated[int, At(ge=2, doc="terms of that series")] = 5

    layers = ("linear", "conv")
    reasons = {
        "layers": "the inputs of an embedding are single words, which have no directions to turn",
        "as_lora": "W′ − W has full rank",
    }
    peft = PeftMap(
        "OFT",
        fields={
            "block_size": "oft_block_size",
            "blocks": "r",
            "block_share": "block_share",
            "coft": "coft",
            "eps": "eps",
            "cayley_neumann": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
        },
        keys={"Q": "oft_R.weight"},
    )

    def slots(self) -> Iterable[Slot]:
        if not self.block_size and not self.blocks:
            raise UserError("oft: block_size and blocks are both 0; give one of them")
        b = self._size()
        yield Slot("Q", "core", (1 if self.block_share else self.site.in_features // b, b * (b - 1) // 2))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        D = self.rotation()
        if self.site.kind == "linear":
            return base(rotations.turn(x, *self.cast(x, D)))
        W, b = (base.weight(), base.bias()) if base.links else (self.site.weight(), self.site.bias())

        def run(x: Tensor, D: Tensor) -> Tensor:
            return self.site.run(x, rotations.turn(W.to(D.dtype), D.mT), b)

        return checkpoint(run, x, D, use_reentrant=False, preserve_rng_state=False)

    def rotation(self) -> Tensor:
        """R − I as blocks (n, b, b), in fp32 at least."""
        Q = self.Q.to(torch.promote_types(self.Q.dtype, torch.float32))
        b = self._size()
        if self.coft:
            bound = self.eps / Q.shape[0] ** 0.5
            norm = 2**0.5 * torch.linalg.vector_norm(Q, dim=1, keepdim=True)
            Q = Q * (bound / norm.clamp_min(bound))
        S = rotations.skew(Q, b)
        D = rotations.cayley_neumann(S, self.terms) if self.cayley_neumann else rotations.cayley(S)
        return D.expand(self.site.in_features // b, b, b)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return rotations.turn(W, self.rotation().mT.to(W.dtype)), b

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def parameter_count(self) -> int:
        """n·b(b − 1)/2, n = in/b or 1."""
        b = self._size()
        return (1 if self.block_share else self.site.in_features // b) * b * (b - 1) // 2

    def _size(self) -> int:
        """b at this layer."""
        n = self.site.in_features
        if self.blocks:
            return n // rotations.nearest_divisor(n, self.blocks)
        return rotations.nearest_divisor(n, self.block_size)
