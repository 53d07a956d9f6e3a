"""LoRA-XS: an r × r core between the frozen singular vectors of W."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import normal
from veneer.numerics.svd import randomized_svd


@method(
    "lora-xs", axis="delta", paper="arXiv:2405.17604", system=0, gives=("core", "linear", "foldable", "frozen-base")
)
class LoRAXS(Delta):
    """r² numbers a matrix: how the r leading singular directions of W map to each other.

    With W = UΣVᵀ: y = xWᵀ + b + s·((xAᵀ)Rᵀ)Bᵀ, ΔW = s·B·R·A with A = Σ_r·V_rᵀ, B = U_r and s = α/r
    (Bałazy et al. 2024, eq. 3). W is not touched.

    ======  =========  =========  ============================================
    tensor  shape      trained    start
    ======  =========  =========  ============================================
    A       (r, in)    no         Σ_r·V_rᵀ, the leading part of W
    R       (r, r)     yes        0, or N(0, std²)
    B       (out, r)   no         U_r
    ======  =========  =========  ============================================

    Defaults: r = 16 (the paper has 4 to 64), α = r; rates are 1e-3 to 4e-3, an order above LoRA's. The paper starts R
    at N(0, 1e-5²), which is all but the base; R = 0 has a gradient as well and is the base exactly.

    Σ is on the side of A as in the official code (the paper writes it at B), and the decomposition is its kind, a
    randomised one, drawn from the seed. The file holds A and B, since W's singular vectors come out the same bit for
    bit on one machine only; ``store="core"`` leaves them out and takes them from W again on loading. Backward keeps
    xAᵀ and not x.
    """

    rank: Annotated[int, At(ge=1, doc="size r of the core")] = 16
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    std: Annotated[float, At(ge=0, doc="standard deviation of R at the start")] = 0.0
    store: Annotated[Literal["factors", "core"], At(doc="what the file holds: A, B and R, or R alone")] = "factors"

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), trained=False)
        yield Slot("R", "core", (self.rank, self.rank), normal(self.std))
        yield Slot("B", "factor_b", (self.site.out_features, self.rank), trained=False)

    def build(self) -> None:
        W = self.site.weight()
        if self.rank > min(W.shape):
            raise UserError(
                f"lora-xs: rank={self.rank} is more than {self.site.path} has singular values, {min(W.shape)}"
            )
        U, S, Vh = randomized_svd(W, self.rank, generator=self.generator("svd"))
        self.set_tensor("A", S[:, None] * Vh)
        self.set_tensor("B", U)
        if self.store == "factors":
            self.rebuilt -= {"A", "B"}
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        return Pair(self.A, self.B @ self.R, self.scale)

    def parameter_count(self) -> int:
        """r²."""
        return self.rank**2
