"""SVFit: train singular values of W between its own singular vectors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.chance import zeros
from veneer.numerics.spectrum import distinct, energy_rank, frame


@method("svfit", axis="delta", paper="arXiv:2409.05926", system=38, gives=("linear", "foldable", "frozen-base"))
class SVFit(Delta):
    """One number a rank: how strong each leading singular direction of W is.

    W = U·diag(σ)·Vᵀ; ΔW = s·U_r·diag(λ − σ)·V_rᵀ with λ = σ + δ: the singular vectors stay (Sun et al. 2024).

    ======  =========  =========  ==========================================
    tensor  shape      trained    start
    ======  =========  =========  ==========================================
    shift   (r,)       yes        0: it is δ; σ with ``absolute``: it is λ
    U       (out, r)   no         the leading left singular vectors
    Vh      (r, in)    no         the leading right ones, as rows
    S       (r,)       no         σ
    ======  =========  =========  ==========================================

    Defaults: all singular values, which is what the paper's 16 times fewer parameters than LoRA of rank 8 come to at
    width 768, and s = 1, as the paper has no scale. ``energy=0.99`` keeps the fewest with that share of Σσ², within r;
    a layer with less than r values trains all. Rates are 10 to 100 times LoRA's: at LoRA's own it seems to do nothing.

    No code is published. The paper splits W in W_r + W_e; here W is not touched: the start is W bit for bit, decay of
    δ pulls to it, and no small step is lost in rounding beside a large σ. ``absolute`` trains the paper's λ, which
    decay pulls to zero. ``nonnegative`` uses no new singular value below zero; its gradient goes on as if it did.

    The file holds δ alone; U and V are found in W again, in fp64, so that other machines find the same. Where two
    values lie so close that their vectors are not determined, the file holds the vectors of that layer too;
    ``store="vectors"`` has it hold all. Backward keeps xV_r and not x.
    """

    rank: Annotated[int | None, At(ge=1, doc="r, singular values that train; all when None")] = None
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s = α/r; the rank when None")] = None
    energy: Annotated[float | None, At(gt=0, le=1, doc="share of Σσ² in the values that train, within r")] = None
    absolute: Annotated[bool, At(doc="train λ itself, not its distance from σ")] = False
    nonnegative: Annotated[bool, At(doc="let no singular value fall below zero")] = False
    store: Annotated[Literal["values", "vectors"], At(doc="what the file holds")] = "values"

    usual_rate = 1e-2

    def slots(self) -> Iterable[Slot]:
        if "S" not in self._buffers:
            self._decompose()
        start = (lambda *_: self.S.clone()) if self.absolute else zeros
        yield Slot("shift", "diagonal", tuple(self.S.shape), start)

    def build(self) -> None:
        self.scale = 1.0 if self.alpha is None else self.alpha / len(self.S)

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the vectors from a saved state that has them."""
        self.rebuilt = {"U", "Vh", "S"} - set(state)

    def pair(self) -> Pair:
        return Pair(self.Vh, self.U * self._change(), self.scale)

    def parameter_count(self) -> int:
        """r, min(out, in) at most."""
        return len(self.S)

    def share_seen(self, gradient: Tensor) -> float:
        """Σ(uᵢᵀGvᵢ)²/‖G‖² of a gradient G (out, in) of W: the share of it that this form can follow, in [0, 1]."""
        G = gradient.to(self.U)
        return float(((self.U.mT @ G) * self.Vh).sum(1).square().sum() / G.square().sum())

    def _change(self) -> Tensor:
        """λ − σ, (r,)."""
        change = self.shift - self.S if self.absolute else self.shift
        if self.nonnegative:
            change = change + (change.clamp(min=-self.S / self.scale) - change).detach()
        return change

    def _decompose(self) -> None:
        U, S, Vh = frame(self.site.weight())
        most = len(S) if self.rank is None else min(self.rank, len(S))
        r = most if self.energy is None else min(most, energy_rank(S, self.energy))
        for name, value in (("U", U[:, :r]), ("S", S[:r]), ("Vh", Vh[:r])):
            self.set_tensor(name, value)
        if self.store == "values" and distinct(S[: r + 1]):
            self.rebuilt |= {"U", "Vh", "S"}
