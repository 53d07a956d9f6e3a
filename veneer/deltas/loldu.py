"""LoLDU: train the diagonal of a lower-diagonal-upper factorisation of W."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.ldu import ldu

START = Literal["lu", "uniform", "normal", "constant", "ones", "zeros", "s_uniform", "s_normal"]


@method("loldu", axis="delta", paper="arXiv:2410.13618", system=2, gives=("linear", "foldable", "frozen-base"))
class LoLDU(Delta):
    """One number a rank: the pivots of W, between its own triangular factors, which stay.

    W = P·L·diag(D)·U by Gauss with partial pivoting; ΔW = s·(PL)_r·diag(z)·U_r with the first r columns, pivots and
    rows, s = α/r (Shi et al. 2024). D + z is the paper's trained diagonal.

    =======  =========  ===========  ==============================================
    tensor   shape      trained      start
    =======  =========  ===========  ==============================================
    z        (r,)       yes          0; with another ``start`` that value less D
    gain     (1,)       train_scale  1, a factor on s
    L        (out, r)   no           the first columns of PL
    U        (r, in)    no           the first rows of U
    D        (r,)       no           the first pivots
    order    (out,)     no           the rows of W as pivoting took them; saved
    =======  =========  ===========  ==============================================

    Defaults: all pivots (the package's 768 at the widths of its models) and s = 1. The package has α = 1, so s = 1/r,
    under which a step of Adam moves the pivots by a rate r times smaller; its rates are not published, 1e-2 does for
    s = 1. Decay pulls to W, as z counts from D; on the paper's diagonal it would pull away from it.

    W is not touched: the package writes the residual W − s·PL·diag(D)·U into the layer and adds the rest, with P as a
    dense matrix, in every forward. Here y = xWᵀ + b + s·((xU_rᵀ)∘z)(PL)_rᵀ, and backward keeps xU_rᵀ and not x. The
    file holds z and the order of rows, from which L and U are found in W again. A layer with less than r pivots trains
    all. The first r are not the largest; ``order="magnitude"``, ours, takes those. A pivot of zero gets a unit vector
    for its row of U. L and U are not orthogonal, so directions are correlated and a change of one forgets widely.
    """

    rank: Annotated[int | None, At(ge=1, doc="r, pivots that train; all when None")] = None
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s = α/r; the rank when None")] = None
    start: Annotated[START, At(doc="where the diagonal starts: at D, or drawn from its mean and spread")] = "lu"
    pivots: Annotated[Literal["first", "magnitude"], At(doc="which pivots train")] = "first"
    train_scale: Annotated[bool, At(doc="a factor on s trains too")] = False

    usual_rate = 1e-2

    def slots(self) -> Iterable[Slot]:
        yield Slot("z", "diagonal", (self._size(),))
        if self.train_scale:
            yield Slot("gain", "gate", (1,), lambda shape, _: torch.ones(shape))

    def build(self) -> None:
        r = self._size()
        self.scale = 1.0 if self.alpha is None else self.alpha / r
        self.starts_at_base = self.start == "lu"
        self._factor(None)
        if self.start != "lu":
            self.set_tensor("z", self._drawn() - self.D, trained=True)

    def match(self, state: dict[str, Tensor]) -> None:
        """Take the factors in the order of rows that a saved state has, should pivoting have gone another way here."""
        if "order" in state and not torch.equal(state["order"].to(self.order), self.order):
            self._factor(state["order"].to(self.order.device))

    def pair(self) -> Pair:
        return Pair(self.U, self.L * self._change(), self.scale)

    def parameter_count(self) -> int:
        """r, and 1 for a trained scale."""
        return self._size() + self.train_scale

    def _size(self) -> int:
        """r at this layer."""
        pivots = min(self.site.out_features, self.site.in_features)
        return pivots if self.rank is None else min(self.rank, pivots)

    def _change(self) -> Tensor:
        """What stands between L and U, (r,)."""
        return self.gain * (self.D + self.z) - self.D if self.train_scale else self.z

    def _factor(self, order: Tensor | None) -> None:
        order, L, D, U = ldu(self.site.weight(), order)
        kept = slice(self._size())
        if self.pivots == "magnitude":
            kept = D.abs().argsort(descending=True, stable=True)[kept].sort().values
        self.set_tensor("L", torch.empty_like(L).index_copy_(0, order, L)[:, kept])
        self.set_tensor("U", U[kept])
        self.set_tensor("D", D[kept])
        self.set_tensor("order", order.int())
        self.rebuilt |= {"L", "U", "D"}

    def _drawn(self) -> Tensor:
        """The starts of the package other than D, (r,)."""
        D, g = self.D.cpu(), self.generator("start")
        mean, spread = D.mean(), D.std(correction=min(1, len(D) - 1))
        uniform, normal = 2 * torch.rand(len(D), generator=g) - 1, torch.randn(len(D), generator=g)
        return {
            "uniform": uniform * mean.abs() / 2,
            "normal": mean + spread * normal,
            "constant": mean.expand(len(D)),
            "ones": torch.ones(len(D)),
            "zeros": torch.zeros(len(D)),
            "s_uniform": uniform,
            "s_normal": normal,
        }[self.start].to(self.D.device)
