"""Gaussian LoRA: a low-rank mean and a low-rank log-variance of every weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from veneer.core.adapted import Base
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics import chance
from veneer.numerics.gaussian import Gaussian, variance

SMALL = 1e-12  # under the root, so that it has a gradient where the input is 0


@method(
    "gaussian-lora",
    axis="delta",
    paper="arXiv:2508.14285",
    system=88,
    gives=("pair", "linear", "foldable", "frozen-base"),
    defaults="abmll",
)
class GaussianLoRA(Delta):
    """LoRA whose weights are a posterior, N(W + s·μ, s²·v) entry by entry (Zhang et al. 2025).

    μ = BA, log v = log c + clamp(B_v·A_v, −10, 18), s = α/r. In training, and while ``sampled`` is set,
    y = xWᵀ + s·xAᵀBᵀ + s·√((x∘x)vᵀ)∘ζ + b with ζ ~ N(0, 1) for every output (local reparametrisation); else, folded
    and exported y is that of the mean, plain LoRA.

    ======  =========  =========  =====================
    tensor  shape      trained    start
    ======  =========  =========  =====================
    A       (r, in)    yes        U(−1/√in, 1/√in)
    B       (out, r)   yes        0
    A_v     (r, in)    yes        U(−1/√in, 1/√in)
    B_v     (out, r)   yes        0: v = c
    ======  =========  =========  =====================

    Defaults: log c = −20 as the paper's, read as a variance. Its variance is BA + c, which a product may make negative:
    the logarithm is ours. So is noise for each token alone, which correlates tokens less than one draw of the weights
    does; ``noise="weight"`` makes that draw, once a pass and layer. The noise costs a product with v, about that of the
    base layer; x alone is kept for it, and v (out, in) made again in backward. Its draws come from the pass's seed.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    log_variance: Annotated[float, At(ge=-70, le=10, doc="log c, where the log-variances start")] = -20.0
    noise: Annotated[Literal["output", "weight"], At(doc="drawn for each output, or for the weights once a pass")] = (
        "output"
    )

    layers = ("linear", "conv")
    deterministic = False
    reasons = {"deterministic": "weights are drawn for every training pass"}

    def slots(self) -> Iterable[Slot]:
        wide, tall = (self.rank, self.site.in_features), (self.site.out_features, self.rank)
        yield Slot("A", "factor_a", wide, chance.kaiming_uniform)
        yield Slot("B", "factor_b", tall)
        yield Slot("A_v", "core", wide, chance.kaiming_uniform)
        yield Slot("B_v", "core", tall)

    def build(self) -> None:
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.sampled: tuple[int | str, ...] | None = None  # words and numbers of a draw outside of training

    def gaussian(self) -> Gaussian:
        """The distribution of ΔW/s."""
        return Gaussian(self.A, self.B, self.A_v, self.B_v)

    def pair(self) -> Pair:
        """The mean."""
        return Pair(self.A, self.B, self.scale)

    def is_plain(self) -> bool:
        return not self.training and self.sampled is None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base.plus(x, self.update(x))
        if self.is_plain():
            return y
        seed = (
            self.draw_seed() if self.sampled is None else chance.derived_seed(self.seed, self.site.path, *self.sampled)
        )
        drawn = self._of_outputs if self.noise == "output" else self._of_weights
        if not torch.is_grad_enabled():
            return y + drawn(x, self.A_v, self.B_v, seed)
        return y + checkpoint(
            drawn, x, self.A_v, self.B_v, seed, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
        )

    def _of_outputs(self, x: Tensor, A_v: Tensor, B_v: Tensor, seed: int) -> Tensor:
        """s·√((x∘x)vᵀ)∘ζ in the layout of the layer's output."""
        spread = (self.site.run(x * x, variance(A_v, B_v)).float() + SMALL).sqrt()
        return (self._size() * spread * self._normal(spread, seed)).to(self.compute_dtype(x))

    def _of_weights(self, x: Tensor, A_v: Tensor, B_v: Tensor, seed: int) -> Tensor:
        """The layer's output for s·√v∘ξ."""
        spread = variance(A_v, B_v).sqrt()
        return self.site.run(x, spread * self._normal(spread, seed)) * self._size()

    def _normal(self, like: Tensor, seed: int) -> Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)

    def _size(self) -> float:
        """s·√c."""
        return self.scale * math.exp(self.log_variance / 2)

    def parameter_count(self) -> int:
        """2r·(in + out)."""
        return 2 * self.rank * (self.site.in_features + self.site.out_features)
