"""RandLoRA: a full-rank change from frozen random bases and trained diagonals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.delta import Delta, Slot
from veneer.core.registry import PeftMap, method
from veneer.core.site import Site
from veneer.fields import At


@method("randlora", axis="delta", paper="arXiv:2502.00987", system=39, gives=("linear", "foldable", "frozen-base"))
class RandLoRA(Delta):
    """Full rank at LoRA's price: a sum of frozen random low-rank bases whose rows and columns are scaled by training.

    With m = min(out, in), M = max(out, in) and n = ⌈m/r⌉ bases, for in ≤ out
    ΔW = s·Σ_j B_j·diag(Λ_:j)·A·diag(Γ_j:) (Albert et al. 2025, eq. 4), transposed for in > out; s = α/r.

    ======  ============  =========  =====================================================================
    tensor  shape         trained    start
    ======  ============  =========  =====================================================================
    lam     (r, n)        yes        Λ: 0
    gamma   (n, m)        yes        Γ: 1/max(n, m)
    A       (r, 1, m*)    no         kaiming uniform over its standard deviation; one for all layers
    B       (M*, n*, r)   no         the same; a layer takes the leading slices A[:, 0, :m], B[:M, :n]
    ======  ============  =========  =====================================================================

    m*, M*, n* are those of the largest adapted layers. A and B are drawn again from ``key`` (the seed when None), so no
    file holds them. Defaults are PEFT's: r = 32, s = 20 (α = 640); α = 20 r when None. A smaller r trains more.
    ``scaling="sqrt_n"`` is the s = α/(r√n) of the official language code.

    Both published codes pair the columns of B with the rows of A in another order than the formula (B flattened with
    the basis first, A with the rank first): the same family, other numbers. That order, and bases drawn in bf16, are
    kept so that files and keys mean the same here as in PEFT. The sum is applied in factors of inner size n·r; ΔW is
    formed for folding alone. At a linear layer the scaled A is made again in the backward pass.
    """

    rank: Annotated[int, At(ge=1, doc="rank of one basis; fewer means more trained parameters")] = 32
    alpha: Annotated[float | None, At(gt=0, doc="numerator of the scale s; 20 times the rank when None")] = None
    dropout: Annotated[float, At(ge=0, lt=1, doc="probability, on x, in training only")] = 0.0
    scaling: Annotated[Literal["peft", "sqrt_n"], At(doc="s = α/r, or α/(r√n)")] = "peft"
    key: Annotated[int | None, At(ge=0, doc="seed of the bases; the adapter's when None")] = None
    sparse: Annotated[bool, At(doc="bases of −1, 0, 1, two thirds of them 0, in place of uniform ones")] = False
    very_sparse: Annotated[bool, At(doc="the same with all but 1/√m* of them 0")] = False

    peft = PeftMap(
        "RANDLORA",
        fields={
            "rank": "r",
            "alpha": "randlora_alpha",
            "dropout": "randlora_dropout",
            "key": "projection_prng_key",
            "sparse": "sparse",
            "very_sparse": "very_sparse",
        },
        keys={"lam": "randlora_lambda", "gamma": "randlora_gamma"},
        config={"save_projection": False, "init_weights": True},
    )
    reasons = {"as_lora": "its rank is that of W"}

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module:
        """The bases, as large as the largest adapted layers need."""
        sides = max(s.out_features for s in sites), max(s.in_features for s in sites)
        key = seed if fields["key"] is None else fields["key"]
        spread = min(sides) ** 0.5 if fields["very_sparse"] else 3.0 if fields["sparse"] else None
        return Bases(fields["rank"], min(sides), max(sides), key, spread).to(sites[0].weight().device)

    def slots(self) -> Iterable[Slot]:
        m, n = self._small(), self._count()
        yield Slot("lam", "core", (self.rank, n))
        yield Slot("gamma", "diagonal", (n, m), lambda shape, _: torch.full(shape, 1 / max(shape)))

    def build(self) -> None:
        alpha = 20 * self.rank if self.alpha is None else self.alpha
        self.scale = alpha / self.rank / (self._count() ** 0.5 if self.scaling == "sqrt_n" else 1)

    def update(self, x: Tensor) -> Tensor:
        kept, dtype, (A, B) = self.drop(x), self.compute_dtype(x), self._bases(self.compute_dtype(x))
        if self.site.kind == "linear":
            return _Factored.apply(kept, self.lam, self.gamma, A, B, self.scale, self._wide(), dtype)
        if not self.site.factored():
            return self.site.run(kept, self.weight())
        S = _scaled(A, self.lam, self.gamma).to(dtype)
        first, second = (S, B) if self._wide() else (B.T, S.T)
        return self.site.lift(self.site.project(kept, first), second) * self.scale

    def weight(self, W: Tensor | None = None) -> Tensor:
        A, B = self._bases(torch.float32)
        change = self.scale * (B @ _scaled(A, self.lam, self.gamma))
        return change if self._wide() else change.T

    def parameter_count(self) -> int:
        """n·(r + m)."""
        return self._count() * (self.rank + self._small())

    def _bases(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, m) and B flattened to (M, n·r), column j·r + t for column t of basis j."""
        large = max(self.site.out_features, self.site.in_features)
        return self.pool.A[: self.rank, 0, : self._small()], self.pool.flat(large, self._count(), dtype)

    def _small(self) -> int:
        return min(self.site.out_features, self.site.in_features)

    def _count(self) -> int:
        return -(-self._small() // self.rank)

    def _wide(self) -> bool:
        """Whether A is on the input's side: in ≤ out."""
        return self.site.in_features <= self.site.out_features


class Bases(nn.Module):
    """A (r, 1, m*) and B (M*, n*, r), drawn as PEFT draws them; buffers that no file holds."""

    def __init__(self, rank: int, small: int, large: int, key: int, spread: float | None = None) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(key)
        count = -(-small // rank)
        if spread is None:
            A = _uniform((rank, 1, small), g)
            B = torch.cat([_uniform((large, 1, rank), g) for _ in range(count)], dim=1)
        else:
            share = 0.5 / spread  # of −1, and of 1
            draws = [torch.rand(shape, generator=g) for shape in ((rank, 1, small), (large, count, rank))]
            A, B = ((u > 1 - share).float() - (u < share).float() for u in draws)
        self.register_buffer("A", A / A.std(), persistent=False)
        self.register_buffer("B", B / B.std(), persistent=False)
        self._flat: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def flat(self, large: int, count: int, dtype: torch.dtype) -> Tensor:
        """The leading slice of B as (large, count·r); layers of one shape share it."""
        key = (large, count, dtype)
        if key not in self._flat:
            with torch.inference_mode(False):
                self._flat[key] = self.B[:large, :count].flatten(1).to(dtype)
        return self._flat[key]

    def _apply(self, fn: Any, recurse: bool = True) -> Bases:
        """Move, but keep the type: the bases are what the key says, to the last digit."""
        self._flat = {}
        return super()._apply(lambda t: t.to(fn(t.new_empty(0)).device), recurse)


def _uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=5**0.5, generator=g)


def _scaled(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    """Λ_tj·A_tv·Γ_jv as (r·n, m), row t·n + j."""
    return (lam[:, :, None] * A[:, None].to(lam.dtype) * gamma).flatten(0, 1)


class _Factored(torch.autograd.Function):
    """``s·(x Sᵀ) Bᵀ`` with S = Λ∘A∘Γ, or ``s·(x B) S`` where A is on the output's side; S is made again in backward."""

    @staticmethod
    def forward(ctx, x, lam, gamma, A, B, scale, wide, dtype):
        rows, S = x.reshape(-1, x.shape[-1]).to(dtype), _scaled(A, lam, gamma).to(dtype)
        y = (rows @ S.T) @ B.T if wide else (rows @ B) @ S
        ctx.save_for_backward(x, lam, gamma, A, B)
        ctx.facts = scale, wide, dtype
        return y.mul_(scale).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, lam, gamma, A, B = ctx.saved_tensors
        scale, wide, dtype = ctx.facts
        rows, S = x.reshape(-1, x.shape[-1]).to(dtype), _scaled(A, lam, gamma).to(dtype)
        g = grad_y.reshape(-1, grad_y.shape[-1]) * scale
        if wide:
            h = g @ B
            grad_S, grad_x = h.T @ rows, h @ S
        else:
            grad_S, grad_x = (rows @ B).T @ g, (g @ S.T) @ B.T
        grad_S = grad_S.view(*lam.shape, -1).to(lam.dtype) * A[:, None].to(lam.dtype)
        grad_lam = (grad_S * gamma).sum(-1)
        grad_gamma = (grad_S * lam[:, :, None]).sum(0)
        return grad_x.view(x.shape).to(x.dtype), grad_lam, grad_gamma, None, None, None, None, None
