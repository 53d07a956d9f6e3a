"""BOFT: a rotation made of sparse ones, as in a butterfly."""

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
from veneer.numerics.chance import ones


@method("boft", axis="delta", paper="arXiv:2311.06243", system=0, gives=("linear", "foldable", "frozen-base"))
class BOFT(Delta):
    """An orthogonal change through which any input reaches any other in m steps, and a scale for each output.

    y = g ∘ (xR)Wᵀ + b with R = B_m···B_1, B_i = P_i·blockdiag(R_i1 … R_in)·P_iᵀ, so W′ = diag(g)·WRᵀ;
    R_ij = (I − S)(I + S)⁻¹ with S = ½(X_ij − X_ijᵀ) (Liu et al. 2024, eqs. 3–5). The bias is not scaled.

    ======  =============  =========  =====
    tensor  shape          trained    start
    ======  =============  =========  =====
    X       (m, n, b, b)   yes        0
    g       (out,)         yes        1
    ======  =============  =========  =====

    P_i sorts the half blocks of each stretch of b·2^(i−1) inputs by parity, P_1 = I. Defaults are PEFT's: b = 4,
    m = 1, which is OFT with a scale. Where b·2^(m−1) does not divide the layer's inputs the nearest b that does is
    taken (even, for m > 1); PEFT refuses. PEFT keeps whole blocks, of which the skew half acts, and so do the files.

    PEFT runs m = 1 without its CUDA kernels whatever is asked, and multiplies by a dense in × in matrix; here every
    factor turns x by its blocks. Backward keeps the input of each factor and, for g, the output before it. A
    convolution is rotated in the dense view, inputs × kernel, and W′ is formed again in the backward pass. Module
    dropout is left out.
    """

    block_size: Annotated[int, At(ge=0, doc="b, inputs in a block")] = 4
    blocks: Annotated[int, At(ge=0, doc="n, in place of their size; 0: by size")] = 0
    factors: Annotated[int, At(ge=1, doc="m, number of butterfly factors")] = 1

    layers = ("linear", "conv")
    reasons = {
        "layers": "the inputs of an embedding are single words, which have no directions to turn",
        "as_lora": "W′ − W has full rank",
    }
    peft = PeftMap(
        "BOFT",
        fields={
            "block_size": "boft_block_size",
            "blocks": "boft_block_num",
            "factors": "boft_n_butterfly_factor",
        },
        keys={"X": "boft_R", "g": "boft_s"},
    )

    def slots(self) -> Iterable[Slot]:
        n, b = self._blocks()
        yield Slot("X", "core", (self.factors, n, b, b))
        yield Slot("g", "magnitude", (self.site.out_features,), ones)

    def build(self) -> None:
        n, b = self._blocks()
        orders = torch.stack([butterfly(n, b, i) for i in range(self.factors)]).to(self.site_device())
        self.register_buffer("order", orders, persistent=False)
        self.register_buffer("back", orders.argsort(1), persistent=False)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        D = self.rotation()
        if self.site.kind != "linear":
            W, b = (base.weight(), base.bias()) if base.links else (self.site.weight(), self.site.bias())

            def run(x: Tensor, D: Tensor, g: Tensor) -> Tensor:
                return self.site.run(x, self._turned(W.to(D.dtype), D.mT, reverse=True) * g[:, None], b)

            return checkpoint(run, x, D, self.g, use_reentrant=False, preserve_rng_state=False)
        z = base(self._turned(x, *self.cast(x, D)))
        b = base.bias() if base.links else base.own_bias()
        own = z if b is None else z - b.to(z.dtype)
        return torch.addcmul(z, own, (self.g - 1).to(z.dtype))

    def rotation(self) -> Tensor:
        """The blocks of every factor less I, (m, n, b, b) in fp32 at least."""
        X = self.X.to(torch.promote_types(self.X.dtype, torch.float32))
        return rotations.cayley((X - X.mT) / 2)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._turned(W, self.rotation().mT.to(W.dtype), reverse=True) * self.g[:, None], b

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def parameter_count(self) -> int:
        """m·in·b + out."""
        n, b = self._blocks()
        return self.factors * n * b * b + self.site.out_features

    def _turned(self, x: Tensor, D: Tensor, reverse: bool = False) -> Tensor:
        """x (…, in) through the factors, the last first; with ``reverse`` the first first."""
        steps = range(self.factors) if reverse else range(self.factors - 1, -1, -1)
        for i in steps:
            x = x if i == 0 else x[..., self.back[i]]
            x = rotations.turn(x, D[i])
            x = x if i == 0 else x[..., self.order[i]]
        return x

    def _blocks(self) -> tuple[int, int]:
        """(n, b) at this layer."""
        inputs, stretch = self.site.in_features, 2 ** (self.factors - 1)
        if not self.block_size and not self.blocks:
            raise UserError("boft: block_size and blocks are both 0; give one of them")
        wanted = inputs // min(self.blocks, inputs) if self.blocks else self.block_size
        if self.factors == 1:
            b = rotations.nearest_divisor(inputs, wanted)
        else:
            b = 2 * rotations.nearest_divisor(inputs, wanted // 2, 2 * stretch)
        if not b:
            raise UserError(
                f"boft: {self.site.path} has {inputs} inputs, which no even block size splits into a multiple of "
                f"{stretch} blocks; take fewer factors than {self.factors}"
            )
        return inputs // b, b


def butterfly(n: int, b: int, i: int) -> Tensor:
    """The order (n·b,) in which factor i takes the inputs: even half blocks of each b·2^i, then odd ones."""
    at = torch.arange(n * b)
    if i == 0:
        return at
    halves = at.view(-1, 2 ** (i + 1), b // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten()
