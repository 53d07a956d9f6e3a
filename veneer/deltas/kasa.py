"""KaSA: an update in the shape of an SVD, in place of the weakest directions of W; and its regulariser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta, Offset, Pair, Slot
from veneer.core.hook import Objective, Run
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform, normal

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method(
    "kasa",
    axis="delta",
    paper="arXiv:2412.06071",
    system=91,
    gives=("linear", "foldable", "frozen-base"),
    defaults="kasa-regulariser",
)
class KaSA(Delta):
    """Drop the r weakest singular directions of W as noise, and learn r new ones with their singular values.

    With W = UΣVᵀ, t its r smallest triplets and W̃ = W − U_tΣ_tV_tᵀ: y = xW̃ᵀ + b + s·((drop(x)Aᵀ)∘g)Bᵀ, so
    ΔW = s·B·diag(g)·A − U_tΣ_tV_tᵀ with s = α/r (Wang et al. 2024, §3).

    ================  =========  =========  ==============================
    tensor            shape      trained    start
    ================  =========  =========  ==============================
    A                 (r, in)    yes        U(−1/√in, 1/√in)
    B                 (out, r)   yes        0
    g                 (r,)       yes        N(0, 1)
    offset.A          (r, in)    no         Σ_tV_tᵀ, or V_tᵀ where out > in
    offset.B          (out, r)   no         U_t, or U_tΣ_t
    ================  =========  =========  ==============================

    Defaults: r = 8 as in the official GLUE script, α = r (there 16), which tunes β and γ of ``kasa-regulariser`` for
    each task. r must be less than min(out, in), and takes much of the layer's function where it is not far less.

    The start is W̃ and not the base; ``truncate=False`` starts at the base. Official code and PEFT write W̃ into the
    layer, for good; here W stays, the dropped directions are a frozen pair that is subtracted, and disabling gives the
    base back. The dropped directions are taken as PEFT does, of the min(out, in) that there are: the official slice
    counts from ``in`` and drops nothing where out ≤ in − r. They are eigenvectors of the smaller Gram matrix in fp64,
    which no small singular value divides. As LoRA on W it is a pair of rank 2r, in which form it is exported.
    """

    rank: Annotated[int, At(ge=1, doc="directions r, dropped and learned")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    truncate: Annotated[bool, At(doc="drop the r smallest singular directions of W")] = True

    starts_at_base = False
    reasons = {"starts_at_base": "the weakest directions of W are dropped at once, and their place is learned"}

    def slots(self) -> Iterable[Slot]:
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))
        yield Slot("g", "diagonal", (self.rank,), normal(1.0))

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.starts_at_base = not self.truncate
        if self.truncate:
            W = self.site.weight()
            if self.rank >= min(W.shape):
                raise UserError(
                    f"kasa: rank={self.rank} would drop all {min(W.shape)} singular directions of {self.site.path}; "
                    "give a smaller rank, or leave the layer out with sites="
                )
            self.offset = Offset(self.site, weakest(W, self.rank), self.adapter_name)

    def pair(self) -> Pair:
        return Pair(self.A * self.g[:, None], self.B, self.scale)

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the dropped directions from W where the file leaves them out, as PEFT's do."""
        if self.offset is not None and not any(name.startswith("offset.") for name in state):
            state |= {"offset.A": self.offset.A, "offset.B": self.offset.B}

    def parameter_count(self) -> int:
        """r·(in + out) + r."""
        return self.rank * (self.site.in_features + self.site.out_features + 1)


@torch.no_grad()
def weakest(W: Tensor, rank: int) -> Pair:
    """The part of W (out, in) in its ``rank`` smallest singular directions, as a pair of scale 1."""
    W = W.float()
    wide = W.double()
    if W.shape[0] <= W.shape[1]:
        U = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, :rank]
        return Pair((U.T @ wide).float(), U.float(), 1.0)
    V = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, :rank]
    return Pair(V.T.float().contiguous(), (wide @ V).float(), 1.0)


@method("kasa-regulariser", axis="objective", paper="arXiv:2412.06071", system=91, defaults="kasa")
class KaSARegulariser(Objective):
    """Keep KaSA's factors near orthonormal and its singular values small (Wang et al. 2024, eqs. 9–12).

    L = L_task + β·Σ‖g‖² + γ·Σ(‖BᵀB − I‖_F + ‖AAᵀ − I‖_F), sums over the layers. The norms are not squared; where one is
    zero so is its gradient.

    Defaults: β = 1e-4 and γ = 1e-3, sums, as PEFT and the official GLUE script, which tunes each between 1e-5 and 1 by
    task. The official code takes the Gram matrices of the large side, ‖AᵀA − I‖_F and ‖BBᵀ − I‖_F (``gram="large"``),
    and divides all of it by the number of layers (``reduction="mean"``): the same minimiser and a much weaker pull,
    as ‖AᵀA − I‖² = ‖AAᵀ − I‖² + in − r, by which it is computed here.
    """

    beta: Annotated[float, At(ge=0, doc="β, weight of the squared singular values")] = 1e-4
    gamma: Annotated[float, At(ge=0, doc="γ, weight of the distance from orthonormal factors")] = 1e-3
    gram: Annotated[Literal["small", "large"], At(doc="the side of the Gram matrices: r, or in and out")] = "small"
    reduction: Annotated[Literal["sum", "mean"], At(doc="over the layers")] = "sum"

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        if not self.sites():
            raise UserError(f"kasa-regulariser is for the form kasa, which {adapter.recipe} does not hold")

    def sites(self) -> list[KaSA]:
        """The deltas it acts on."""
        return [d for d in self.adapter.members() if isinstance(d, KaSA)]

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        if not (self.beta or self.gamma):
            return None
        sites = self.sites()
        total = self.beta * sum(d.g.square().sum() for d in sites)
        if self.gamma:
            total = total + self.gamma * sum(self._distance(d.A) + self._distance(d.B.T) for d in sites)
        return total / len(sites) if self.reduction == "mean" else total

    def _distance(self, M: Tensor) -> Tensor:
        """‖MMᵀ − I‖_F of M (r, n), or ‖MᵀM − I‖_F."""
        distance = (M @ M.T - torch.eye(len(M), device=M.device)).norm()
        return distance if self.gram == "small" else (distance.square() + M.shape[1] - len(M)).sqrt()
