"""LaMDA: a small core between singular vectors of W, the upper ones of which are frozen as training goes on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.hook import Optim, Schedule
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import kaiming_uniform, zeros
from veneer.numerics.svd import randomized_svd
from veneer.parts.trainability import remove_parameters

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


@method(
    "lamda",
    axis="delta",
    paper="arXiv:2406.12832",
    system=27,
    gives=("core", "linear", "foldable", "frozen-base"),
    defaults="lamda-freezing",
)
class LaMDA(Delta):
    """A frozen down-projection, an r × r core that trains, an up-projection that trains at first (Azizi et al. 2024).

    y = xWᵀ + b + s·(drop(x)Aᵀ)(BS − H)ᵀ, so ΔW = s·(B·S − H)·A with s = α/r and H the start of B·S. In the paper's
    words A is PMA, S is LDA, B is PMB. With W = UΣVᵀ:

    ======  =========  =====================  =====================  ===============  ===============
    tensor  shape      trained                ``start="spectral"``   ``"zero"``       ``"released"``
    ======  =========  =====================  =====================  ===============  ===============
    A       (r, in)    no                     V_rᵀ                   V_rᵀ             U(−1/√in, 1/√in)
    S       (r, r)     yes                    diag(σ_1 … σ_r)/s      0                U(−1/√r, 1/√r)
    B       (out, r)   see lamda-freezing     U_r                    U_r              0
    H       (out, r)   no                     U_r·diag(σ)/s          none             none
    ======  =========  =====================  =====================  ===============  ===============

    Defaults: r = 64, α = 16, as in the published scripts; their learning rate is 3e-4, decay 0.1. That the projections
    are singular vectors is the paper's idea; the residual base W − U_rΣ_rV_rᵀ that "spectral" implies is inferred, and
    the published code has only "released", without an SVD. All three starts equal the base bit for bit. W
    is not written: what the start takes out of it shares A with what is learned, so all of it is one pair of rank r.

    Backward keeps xAᵀ and never x; dropout on x is replayed from a seed and keeps no mask. With "spectral" it would
    drop principal parts of W and is refused; weight decay pulls them, too, towards 0. A, B, S and H are in the file.
    """

    rank: Annotated[int, At(ge=1, doc="size r of the core")] = 64
    alpha: Annotated[float, At(gt=0, doc="numerator of the scale s = α/r")] = 16.0
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    start: Annotated[Literal["spectral", "zero", "released"], At(doc="where A, S and B start")] = "spectral"

    def slots(self) -> Iterable[Slot]:
        released = self.start == "released"
        yield Slot("A", "factor_a", (self.rank, self.site.in_features), kaiming_uniform, trained=False)
        yield Slot("S", "core", (self.rank, self.rank), kaiming_uniform if released else zeros)
        yield Slot("B", "factor_b", (self.site.out_features, self.rank))

    def build(self) -> None:
        self.scale = self.alpha / self.rank
        if self.start == "released":
            return
        W = self.site.weight()
        if self.rank > min(W.shape):
            raise UserError(
                f"lamda: rank={self.rank} is more than {self.site.path} has singular values, {min(W.shape)}"
            )
        U, values, Vh = randomized_svd(W, self.rank, generator=self.generator("svd"))
        self.set_tensor("A", Vh)
        self.set_tensor("B", U, trained=True)
        self.rebuilt.discard("A")
        if self.start == "spectral":
            if self.dropout:
                raise UserError(
                    f"lamda with dropout={self.dropout} would drop principal parts of W; leave dropout at 0, "
                    "or take start='zero'"
                )
            self.set_tensor("S", values.diag() / self.scale, trained=True)
            self.set_tensor("H", self.B.detach() @ self.S.detach())

    def pair(self) -> Pair:
        B = self.B @ self.S
        return Pair(self.A, B if self.start != "spectral" else B - self.H, self.scale)

    def parameter_count(self) -> int:
        """r² + r·out; r² once all of B is frozen."""
        return self.rank**2 + (self.rank * self.site.out_features if self.B.requires_grad else 0)


def frozen_columns(step: int, steps: int, rank: int, share: float, rule: str = "paper") -> int:
    """c = min(r, ⌊r·τ/(η·T)⌋) at optimiser step τ of T; the published code leaves out the factor r."""
    if share == 0:
        return rank
    passed = step / (share * steps)
    return min(rank, math.floor((passed if rule == "released" else rank * passed) + 1e-9))


@method("lamda-freezing", axis="optim", paper="arXiv:2406.12832", system=27, defaults="lamda")
class LaMDAFreezing(Optim):
    """Freeze LaMDA's B column by column, the largest singular values first (Azizi et al. 2024, §3).

    At step τ of T the first c(τ) = min(r, ⌊r·τ/(η·T)⌋) columns keep their values bit for bit, whatever the optimiser's
    moments and decay say; from τ = ηT on only S trains, and B's gradient and optimiser state are gone.

    Defaults: η = 0.3 from the published code. Its counter lacks the factor r, so that with r ≥ 4 it never freezes B,
    and it masks gradients only, so that moments and decay move frozen columns: ``rule="released"`` does the same,
    for comparison. S learns at ``core_rate`` times B's rate, which is ours: r² numbers move slowly at LoRA's rates.
    """

    share: Annotated[float, At(ge=0, le=1, doc="η, the share of the run after which all of B is frozen")] = 0.3
    core_rate: Annotated[float, At(gt=0, doc="rate of S over that of B")] = 10.0
    rule: Annotated[Literal["paper", "released"], At(doc="how many columns are frozen when")] = "paper"

    def on_attach(self, adapter: Adapter) -> None:
        if not self.sites():
            raise UserError(f"lamda-freezing is for the form lamda, which {adapter.recipe} does not hold")
        self.steps = 1
        self.held: list[tuple[Tensor, Tensor]] = []

    def sites(self) -> list[LaMDA]:
        """The deltas it acts on."""
        return [d for d in self.adapter.members() if isinstance(d, LaMDA)]

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        cores = {id(d.S) for d in self.sites()}
        named = [(n, p) for n, p in adapter.named_parameters() if id(p) in cores]
        return [{"params": [p for _, p in named], "names": [n for n, _ in named], "rate": self.core_rate}]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.steps = schedule.steps

    def frozen(self, delta: LaMDA, step: int) -> int:
        """How many columns of a site's B are frozen at a step."""
        return frozen_columns(step, self.steps, delta.rank, self.share, self.rule)

    def before_step(self, step: int) -> None:
        done = [d for d in self.sites() if d.B.requires_grad and self.frozen(d, step) == d.rank]
        if self.rule == "paper":
            self._let_go(done)

    def _let_go(self, deltas: list[LaMDA]) -> None:
        remove_parameters(self.adapter, [d.B for d in deltas])
        for d in deltas:
            d.B.requires_grad_(False)
            d.B.grad = None

    def after_backward(self, step: int) -> None:
        self.held = []
        for d in self.sites():
            columns = self.frozen(d, step)
            if d.B.grad is not None and columns:
                d.B.grad[:, :columns] = 0
                if self.rule == "paper":
                    self.held.append((d.B, d.B.detach()[:, :columns].clone()))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for B, values in self.held:
            B[:, : values.shape[1]] = values

    def on_end(self) -> None:
        for d in self.sites():
            d.B.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        return {"done": [d.site.path for d in self.sites() if not d.B.requires_grad]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._let_go([d for d in self.sites() if d.site.path in state.get("done", ())])
