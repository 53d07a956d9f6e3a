"""PaCA: train some columns of the weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.errors import UserError
from veneer.fields import At


@method("paca", axis="delta", paper="arXiv:2503.01905", system=92, gives=("linear", "foldable", "frozen-base"))
class PaCA(Delta):
    """r randomly chosen input columns of W train; the layer's input is needed only there.

    W′[:, I] = W[:, I] + δ, y = xW′ᵀ + b = xWᵀ + b + x[…, I]δᵀ (Woo et al. 2025, eq. 6). As LoRA it is A = E_I, the
    one-hot rows of I, and B = δ.

    ==========  ==========  =========  =====================================
    tensor      shape       trained    start
    ==========  ==========  =========  =====================================
    P           (out, r)    yes        0, or W[:, I]/s with store="columns"
    indices     (r,) int    no         I: the first r of a random permutation
    ==========  ==========  =========  =====================================

    Defaults: r = 8 as in the official code. ``store="delta"`` keeps δ = s·P with s = α/r, 1 when α is None: decay pulls
    to the base, and a bf16 weight does not swallow small steps. ``store="columns"`` is the official form: P holds the
    columns themselves, W′[:, I] = s·P, and decay pulls them to 0.

    The official code writes the columns into W before a forward, on a count of forwards that presumes gradient
    checkpointing; otherwise every second step runs on stale columns, and evaluation lags a step. Here W is not written
    and adapters share a base: the fused product runs the pair (E_I, P), whose value and gradients are the same, and
    keeps x[…, I] alone, N × r, for the backward pass. It has no dropout, as the official one.
    """

    rank: Annotated[int, At(ge=1, doc="number of columns r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    store: Annotated[Literal["delta", "columns"], At(doc="P is the change of the columns, or the columns")] = "delta"
    select: Annotated[
        Literal["random", "norm_max", "norm_min"], At(doc="which columns: at random, of largest or smallest norm")
    ] = "random"

    layers = ("linear", "conv")
    reasons = {"layers": "columns of an embedding are single words, most of which no batch ever meets"}

    def slots(self) -> Iterable[Slot]:
        yield Slot("P", "sparse", (self.site.out_features, self.rank))

    def build(self) -> None:
        if self.rank > self.site.in_features:
            raise UserError(
                f"paca: rank={self.rank} is more than {self.site.path} has columns, {self.site.in_features}"
            )
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.register_buffer("indices", self._chosen().to(self.site_device()))
        if self.store == "columns":
            home = self.beneath().weight()[:, self.indices] / self.scale
            self.register_buffer("home", home, persistent=False)
            self.set_tensor("P", home.clone(), trained=True)

    def pair(self) -> Pair:
        E = F.one_hot(self.indices, self.site.in_features).to(self.P.dtype)
        return Pair(E, self.P if self.store == "delta" else self.P - self.home, self.scale)

    def parameter_count(self) -> int:
        """r·out."""
        return self.rank * self.site.out_features

    def _chosen(self) -> Tensor:
        if self.select == "random":
            return torch.randperm(self.site.in_features, generator=self.generator("columns"))[: self.rank].sort().values
        norms = torch.linalg.vector_norm(self.site.weight(), dim=0, dtype=torch.float32)
        return norms.topk(self.rank, largest=self.select == "norm_max").indices.sort().values
