"""Linear layers that share their input, with or without a low-rank change, as one autograd function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.numerics import lowrank
from veneer.numerics.lowrank import Branch, Factors

Plain = Callable[[nn.Module], Sequence | None]

TENSORS = 5  # of a branch: weight, bias, A, B, gain


def branch_of(module: nn.Module, plain: Plain | None, dtype: torch.dtype) -> Branch | None:
    """What a linear layer computes, if that is ``x Wᵀ + b`` with at most one plain pair and nothing listens; else None.

    ``plain(module)`` gives the first seven fields of a `Branch`, and perhaps the gain, for a layer with an adapter.
    """
    if listened(module):
        return None
    if type(module) is nn.Linear:
        branch = Branch(module.weight, module.bias)
    else:
        found = None if plain is None else plain(module)
        if found is None:
            return None
        branch = Branch(*found)
    W = branch.weight
    if isinstance(W, Tensor) and (W.requires_grad or W.dtype != dtype):
        return None
    return branch


def listened(module: nn.Module) -> bool:
    """Whether a hook would miss a module that is not called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def linear_group(x: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, ...]:
    """The outputs ``(…, out_i)`` of layers that share ``x (…, in)``; ``x`` is kept once."""
    return _LinearGroup.apply(x, facts(branches), *flat(branches))


def facts(branches: Sequence[Branch]) -> tuple[tuple, ...]:
    """Of each branch what is not a tensor: stored weight, scale, dropout, seed."""
    return tuple((None if isinstance(b.weight, Tensor) else b.weight, b.scale, b.dropout, b.seed) for b in branches)


def flat(branches: Sequence[Branch]) -> list[Tensor | None]:
    """The tensors of all branches in a row: weight, bias, A, B, gain of each."""
    return [t for b in branches for t in (b.weight if isinstance(b.weight, Tensor) else None, b.bias, b.A, b.B, b.gain)]


def unflat(facts: Sequence[tuple], tensors: Sequence[Tensor | None]) -> list[Branch]:
    """The branches back from `facts` and `flat`."""
    branches = []
    for i, (stored, scale, dropout, seed) in enumerate(facts):
        weight, bias, A, B, gain = tensors[i * TENSORS : (i + 1) * TENSORS]
        branches.append(Branch(stored if weight is None else weight, bias, A, B, scale, dropout, seed, gain))
    return branches


def wanted(needs: Sequence[bool]) -> list[tuple[bool, bool, bool, bool]]:
    """Of each branch whether bias, A, B and gain ask for a gradient, from the flags of `flat`'s tensors."""
    return [tuple(needs[i + 1 : i + TENSORS]) for i in range(0, len(needs), TENSORS)]


def in_order(found: Sequence[lowrank.Gradients]) -> list[Tensor | None]:
    """Gradients in the order of `flat`."""
    return [g for x in found for g in (None, *x)]


def keep_only(values: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """The values that backward will ask for."""
    return [v if n else None for v, n in zip(values, needs)]


def input_of(x: Tensor, need: Sequence[tuple[bool, bool, bool, bool]]) -> Tensor:
    """What is kept of the input: without a gradient of any A its shape is enough."""
    return x if any(n[1] for n in need) else x.new_empty(()).expand(x.shape)


class _LinearGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, facts, *tensors):
        branches = unflat(facts, tensors)
        factors = Factors.of(branches, x.dtype)
        ys, hs, zs = lowrank.run(x.reshape(-1, x.shape[-1]), branches, factors)
        need = wanted(ctx.needs_input_grad[2:])
        hs, zs = keep_only(hs, [n[2] for n in need]), keep_only(zs, [n[3] for n in need])
        ctx.facts = facts
        ctx.save_for_backward(input_of(x, need), *tensors, *hs, *zs, factors.A, *factors.B)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *rest = ctx.saved_tensors
        count = len(ctx.facts)
        tensors, rest = rest[: count * TENSORS], rest[count * TENSORS :]
        grad_x, found = lowrank.gradients(
            x.reshape(-1, x.shape[-1]),
            unflat(ctx.facts, tensors),
            Factors(rest[2 * count], tuple(rest[2 * count + 1 :])),
            [g.reshape(-1, g.shape[-1]) for g in grads],
            rest[:count],
            rest[count : 2 * count],
            ctx.needs_input_grad[0],
            wanted(ctx.needs_input_grad[2:]),
        )
        return (None if grad_x is None else grad_x.view(x.shape)), None, *in_order(found)
