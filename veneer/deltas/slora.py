"""StructuredLoRA and IntTune: a small matrix between the two factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform
from veneer.numerics.landmarks import Choice, landmarks
from veneer.numerics.solve import nystrom

GIVES = ("core", "linear", "foldable", "frozen-base")


@method("slora", axis="delta", paper="arXiv:2502.14482", system=9, gives=GIVES)
class SLoRA(Delta):
    """LoRA with a third trained factor, r × r, between A and B: StructuredLoRA.

    y = xWᵀ + b + s·(((xAᵀ)Nᵀ)Bᵀ), so ΔW = s·B·N·A with s = α/r (Guo et al. 2025, §3.1).

    ======  =========  =========  ==============================
    tensor  shape      trained    start
    ======  =========  =========  ==============================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    N       (r, r)     yes        U(−1/√r, 1/√r)
    B       (out, r)   yes        0
    ======  =========  =========  ==============================

    The start is the official code's, where A and N have no gradient in the first step, since B = 0. Defaults: r = 8 and
    α = r, as LoRA here; the paper has r = α = 128, rate 2e-4, no dropout, no decay. ``nlora`` starts the three factors
    at blocks of W. It is no relation of the federated method, or of the server, of the same name.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("N", "core", (self.rank, self.rank), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank

    def pair(self) -> Pair:
        return Pair(self.A, self.B @ self.N, self.scale)

    def parameter_count(self) -> int:
        """r·(in + out) + r²."""
        return self.rank * (self.site.in_features + self.site.out_features) + self.rank**2


@method("inttune", axis="delta", paper="arXiv:2502.14482", system=9, gives=GIVES)
class IntTune(Delta):
    """NLoRA with frozen outer factors: r² numbers map r rows of W to r columns of it.

    ΔW = s·B·N·A with A = W[I, :], B = W[:, J] and s = α/r, y = xWᵀ + b + s·((xAᵀ)Nᵀ)Bᵀ (Guo et al. 2025, §3.3).

    ========  =========  =========  ==============================================
    tensor    shape      trained    start
    ========  =========  =========  ==============================================
    A         (r, in)    no         W[I, :]; not in the file
    N         (r, r)     yes        0; W[I, J] without the residual
    B         (out, r)   no         W[:, J]; not in the file
    rows      (r,) int   no         I, the first r, at random or by leverage
    columns   (r,) int   no         J, likewise
    ========  =========  =========  ==============================================

    The paper's N starts at N₀ = W[I, J], which is off the base and on SmolLM2-135M ruins it (a loss of 15.7 from 2.0).
    With ``residual``, the default here, s·B·N₀·A leaves W, as elsewhere; A and B being frozen, that is to train the
    difference N − N₀ from 0, and neither N₀ nor a second pair is needed. Defaults: r = 16, α = r; the paper has
    r = α = 128, rate 2e-4. Backward keeps xAᵀ and not x. ``core="pinv"`` starts at the pseudo-inverse of W[I, J], the
    textbook Nyström approximation, of which the official code has a commented line.
    """

    rank: Annotated[int, At(ge=1, doc="size r of the core")] = 16
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    residual: Annotated[bool, At(doc="start at the base")] = True
    choice: Annotated[Choice, At(doc="which rows and columns of W")] = "first"
    core: Annotated[Literal["block", "pinv"], At(doc="N₀, without the residual")] = "block"

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), trained=False)
        yield Slot("N", "core", (self.rank, self.rank))
        yield Slot("B", "factor_b", (self.site.out_features, self.rank), trained=False)

    def build(self) -> None:
        W = self.site.weight()
        if self.rank > min(W.shape):
            raise UserError(
                f"inttune: rank={self.rank} is more than {self.site.path} has rows or columns, {min(W.shape)}"
            )
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.starts_at_base = self.residual
        rows, columns = landmarks(W, self.rank, self.choice, self.generator("landmarks"))
        self._take(rows, columns)
        if not self.residual:
            corner = nystrom(W.float(), rows, columns)[1] if self.core == "pinv" else self.A[:, columns]
            self.set_tensor("N", corner, trained=True)

    def _take(self, rows: Tensor, columns: Tensor) -> None:
        W = self.site.weight()
        self.set_tensor("rows", rows)
        self.set_tensor("columns", columns)
        self.set_tensor("A", W[rows].float())
        self.set_tensor("B", W[:, columns].float())

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the rows and columns that a saved state names."""
        if "rows" in state and "columns" in state:
            self._take(*(state[n].to(self.site_device()) for n in ("rows", "columns")))

    def pair(self) -> Pair:
        return Pair(self.A, self.B @ self.N, self.scale)

    def parameter_count(self) -> int:
        """r²."""
        return self.rank**2
