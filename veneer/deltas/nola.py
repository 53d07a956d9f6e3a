"""NOLA: LoRA factors as mixtures of random matrices that a seed gives again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.context import Context, current
from veneer.core.delta import Delta, Pair, Slot
from veneer.core.registry import method
from veneer.fields import At
from veneer.numerics.chance import derived_seed, kaiming_uniform, zeros

CHUNK = 1 << 18  # entries of a basis that are in memory at a time


@method("nola", axis="delta", paper="arXiv:2310.02556", system=46, gives=("linear", "foldable", "frozen-base"))
class NOLA(Delta):
    """2k numbers a matrix whatever its size: both factors are sums of k random matrices, and the weights train.

    A = A₀ + Σᵢ αᵢ·Aᵢ, B = Σⱼ βⱼ·Bⱼ, y = xWᵀ + b + s·drop(x)AᵀBᵀ (Koohpayegani et al. 2024, eq. 2), with the
    entries of Aᵢ (r, in) and Bⱼ (out, r) from U(−1, 1)/√k and s = α/r.

    ======  =========  =========  ==================================  ====================
    tensor  shape      trained    start                               with ``start="vit"``
    ======  =========  =========  ==================================  ====================
    mix_a   (k,)       yes        α: 0                                1/k
    mix_b   (k,)       yes        β: 0                                1/k
    A0      (r, in)    no         U(−1/√in, 1/√in), from the seed     0
    ======  =========  =========  ==================================  ====================

    Defaults: r = 8 and s = 1 as in the official GPT-2 medium run, which has k = 512; k = 64 here, as every step draws
    2·k·r·(in + out) random numbers. Rates are 1e-3 to 1e-2, without decay. ``start="vit"`` is the official ViT code:
    no A₀, bases of bound 1/√(r·in) and 1/√(r·out), s = 1/r (``alpha=1.0``); it does not start at the base.

    Neither the model nor the file holds a basis. It is drawn piece by piece, mixed in fp32 and dropped, and drawn again
    for dαᵢ = ⟨∂L/∂A, Aᵢ⟩. A and B are put together once a forward of the model, so that gradients of several uses are
    summed before that, and their values are kept while the weights stay: recomputation and evaluation draw nothing.

    The entries come from a generator whose stream is the same in every version and on every device, 16 bits each, ten
    times as fast as torch's. The official code reseeds the global generator in every forward, which disturbs dropout
    and the order of data, and its file lacks A₀ or the seed of it.
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension r")] = 8
    bases: Annotated[int, At(ge=1, doc="k, random matrices a factor")] = 64
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    start: Annotated[Literal["base", "vit"], At(doc="the base, or the start of the official ViT code")] = "base"

    usual_rate = 5e-3

    def slots(self) -> Iterable[Slot]:
        ours = self.start == "base"
        first = zeros if ours else lambda shape, _: torch.full(shape, 1 / shape[0])
        yield Slot("mix_a", "core", (self.bases,), first)
        yield Slot("mix_b", "core", (self.bases,), first)
        yield Slot("A0", "factor_a", (self.rank, self.site.in_features), kaiming_uniform if ours else zeros, False)

    def build(self) -> None:
        self.starts_at_base = self.start == "base"
        self.scale = (self.rank if self.alpha is None else self.alpha) / self.rank
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}  # weights and what they gave

    def prepare(self, ctx: Context) -> None:
        """Put A and B together for the forward pass that begins."""
        ctx.keep(self, self._assembled())

    def pair(self) -> Pair:
        """A and B: those of the forward under way, or put together for the moment."""
        ctx = current()
        kept = None if ctx is None else ctx.kept.get(self)
        return self._assembled() if kept is None else kept

    def parameter_count(self) -> int:
        """2k."""
        return 2 * self.bases

    def _assembled(self) -> Pair:
        A = self._mixed("mix_a", (self.rank, self.site.in_features))
        B = self._mixed("mix_b", (self.site.out_features, self.rank))
        return Pair(self.A0 + A, B, self.scale)

    def _mixed(self, name: str, shape: tuple[int, int]) -> Tensor:
        bound = (self.bases if self.start == "base" else shape[0] * shape[1]) ** -0.5
        basis = Basis(derived_seed(self.seed, self.site.path, name), self.bases, shape, bound)
        weights = getattr(self, name)
        known = self.kept.get(name)
        if known is None or known[0].device != weights.device or not torch.equal(known[0], weights):
            known = self.kept[name] = (weights.detach().clone(), basis.mixed(weights.detach()))
        return _Mixed.apply(weights, known[1], basis)


class Basis(NamedTuple):
    """``count`` matrices of one shape with entries from U(−bound, bound), as a function of a seed."""

    seed: int
    count: int
    shape: tuple[int, int]
    bound: float

    def mixed(self, weights: Tensor) -> Tensor:
        """Σ wᵢ·Aᵢ, fp32, on the device of the weights (count,)."""
        w, n = weights.cpu(), self.shape[0] * self.shape[1]
        total = torch.zeros(-(-n // 4) * 4)
        for at, entries in self._pieces():
            total += w[at] @ entries
        total = (total[:n] + 0.5 * w.sum()).mul_(self.bound / 2**15)
        return total.view(self.shape).to(weights.device)

    def inner(self, G: Tensor) -> Tensor:
        """⟨G, Aᵢ⟩ for every i, (count,), fp32."""
        g = torch.zeros(-(-G.numel() // 4) * 4)
        g[: G.numel()] = G.reshape(-1)
        found = torch.cat([entries @ g for _, entries in self._pieces()])
        return (found + 0.5 * g.sum()).mul_(self.bound / 2**15).to(G.device)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Whole numbers e of which (e + ½)/2¹⁵ lie evenly in (−1, 1): a run of matrices at a time, a row each.

        A row begins with a new word of four entries, so that the length of the runs changes nothing.
        """
        words = -(-self.shape[0] * self.shape[1] // 4)
        run = max(1, CHUNK // (4 * words))
        stream, buffer = np.random.SFC64(self.seed), torch.empty(min(run, self.count), 4 * words)
        for start in range(0, self.count, run):
            rows = buffer[: min(run, self.count - start)]
            bits = stream.random_raw(len(rows) * words).astype("<u8", copy=False).view("<i2")
            yield slice(start, start + len(rows)), rows.copy_(torch.from_numpy(bits).view(rows.shape))


class _Mixed(torch.autograd.Function):
    """The mixture, whose value is known; backward draws the basis again and keeps nothing of it."""

    @staticmethod
    def forward(ctx, weights, value, basis):
        ctx.basis = basis
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.basis.inner(grad), None, None
