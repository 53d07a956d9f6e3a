"""The curvature of a loss in some parameters: products with the Hessian and a probe of its spectrum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.numerics import chance
from veneer.numerics.lanczos import lanczos, ritz
from veneer.parts.modes import in_mode

Loss = Callable[[], Tensor]
REACH = 1e-2  # of a gradient difference, in lengths of the parameters' root mean square entry


@dataclass(frozen=True)
class Curvature:
    """Ritz values (ascending) and their weights; ``top`` is the largest in absolute value, which limits the rate."""

    values: list[float]
    weights: list[float]

    @property
    def top(self) -> float:
        """max |θ|."""
        return max(abs(v) for v in self.values)

    @property
    def largest(self) -> float:
        """λ_max."""
        return self.values[-1]

    @property
    def smallest(self) -> float:
        """λ_min."""
        return self.values[0]


def hessian_product(loss: Loss, params: Sequence[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """v (P,) ↦ Hv (P,) at the parameters as they are, ∇(∇L·v): the graph is made once and must allow it.

    Fused products and attention kernels do not; `difference_product` serves everywhere.
    """
    gradient = _flat(torch.autograd.grad(loss(), params, create_graph=True), params)

    def product(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient @ v.to(gradient.dtype), params, retain_graph=True, allow_unused=True)
        return _flat(found, params).to(v.dtype)

    return product


def difference_product(loss: Loss, params: Sequence[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """v (P,) ↦ (∇L(θ + hv) − ∇L(θ − hv))/2h, for |v| = 1; exact on quadratics but for rounding.

    The parameters are back bit for bit after every product.
    """
    start = [p.detach().clone() for p in params]
    size = sum(p.numel() for p in params)
    root = float(torch.stack([p.square().sum() for p in start]).sum() / size) ** 0.5
    h = REACH * max(root, 1e-3) * size**0.5

    def at(sign: float, v: Tensor) -> Tensor:
        try:
            for p, s, piece in zip(params, start, v.split([p.numel() for p in params])):
                p.data.copy_(s).add_(piece.view_as(p).to(p.dtype), alpha=sign * h)
            return _flat(torch.autograd.grad(loss(), params, allow_unused=True), params)
        finally:
            for p, s in zip(params, start):
                p.data.copy_(s)

    return lambda v: ((at(1.0, v) - at(-1.0, v)) / (2 * h)).to(v.dtype)


def curvature_probe(
    model: nn.Module,
    loss: Loss,
    params: Sequence[nn.Parameter] | None = None,
    steps: int = 20,
    seed: int = 0,
    exact: bool = True,
) -> Curvature:
    """The spectrum of the Hessian of ``loss()`` in ``params`` (all that train, when None), by ``steps`` of Lanczos.

    The model is in eval mode meanwhile; its parameters, gradients and modes, and the global generators, are as before
    afterwards. ``exact`` takes `hessian_product`, else gradient differences. One product costs two backward passes.
    """
    params = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    start = torch.randn(sum(p.numel() for p in params), generator=chance.generator(seed, "lanczos"))
    with in_mode(model), torch.random.fork_rng(), torch.enable_grad():
        product = (hessian_product if exact else difference_product)(loss, params)
        theta, weights = ritz(*lanczos(product, start.to(params[0]), steps))
    return Curvature(theta.tolist(), weights.tolist())


def _flat(tensors: Sequence[Tensor | None], params: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if t is None else t.flatten() for t, p in zip(tensors, params)])
