"""Linear layers with a low-rank change that share one input: their products and gradients, without autograd.

``y_i = g_i ∘ (x W_iᵀ + s_i (drop_i(x) A_iᵀ) B_iᵀ) + b_i``. One layer is a group of one. The sharing saves products: the
``A_i`` run stacked, and the gradient of ``x`` is one sum that every product adds into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.numerics.dropout import keep_mask


class Branch(NamedTuple):
    """One layer: ``weight`` (out, in), a function giving it, or None for no base; ``A`` (r, in) or None for no change.

    ``B`` (out, r), ``gain`` (out,) and ``bias`` (out,) may be None but for B beside A. ``dropout`` lies in [0, 1) and
    needs a ``seed``.
    """

    weight: Tensor | Callable[[], Tensor] | None
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int | None = None
    gain: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in the compute precision."""
        assert self.weight is not None
        W = self.weight if isinstance(self.weight, Tensor) else self.weight()
        return W.to(dtype)

    def scaled(self, dtype: torch.dtype) -> Tensor:
        """``s/(1 − p) · B`` (out, r) in the compute precision, the factor applied in B's own."""
        assert self.B is not None
        return (self.B * self.factor).to(dtype)

    @property
    def factor(self) -> float:
        """The scale over the share of x that dropout leaves."""
        return self.scale / (1.0 - self.dropout)


class Gradients(NamedTuple):
    """Of one branch, each in the precision of its tensor; None where it is not asked for."""

    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None


def run(rows: Tensor, branches: Sequence[Branch]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The outputs ``y`` (N, out) of ``rows`` (N, in), and what backward needs: ``h = drop(x) Aᵀ`` (N, r), and for a
    branch with a gain ``z`` (N, out), the output before gain and bias."""
    dtype = rows.dtype
    hidden = _project(rows, branches)
    outputs: list[Tensor] = []
    before: list[Tensor | None] = []
    for branch, h in zip(branches, hidden):
        b = None if branch.bias is None else branch.bias.to(dtype)
        late = branch.gain is not None or branch.weight is None
        y = None if branch.weight is None else F.linear(rows, branch.dense(dtype), None if late else b)
        if h is not None:
            B = branch.scaled(dtype)
            y = h @ B.t() if y is None else y.addmm_(h, B.t())
        assert y is not None, "a branch has a weight or a change"
        z = None
        if branch.gain is not None:
            z, y = y, gained(y, branch.gain)
        if late and b is not None:
            y += b
        outputs.append(y)
        before.append(z)
    return outputs, hidden, before


def gained(z: Tensor, gain: Tensor) -> Tensor:
    """``z ∘ gain`` as ``z + z·(gain − 1)``: in bf16 a gain near 1 would lose the digits in which it differs from 1."""
    return torch.addcmul(z, z, (gain - 1).to(z.dtype))


def gradients(
    rows: Tensor,
    branches: Sequence[Branch],
    grads: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    before: Sequence[Tensor | None],
    need_rows: bool,
    needs: Sequence[tuple[bool, bool, bool, bool]],
) -> tuple[Tensor | None, list[Gradients]]:
    """The gradient of ``rows`` (N, in), and of each branch's bias, A, B and gain where ``needs`` says so.

    ``grads`` are those of the outputs (N, out); ``hidden`` and ``before`` are what `run` gave, where they are needed.
    """
    dtype = rows.dtype
    sums = torch.promote_types(dtype, torch.float32)
    found: list[Gradients] = []
    grads = list(grads)
    back: list[Tensor | None] = [None] * len(branches)
    for i, (branch, need) in enumerate(zip(branches, needs)):
        need_bias, need_A, need_B, need_gain = need
        g = grads[i]
        bias = g.sum(0, dtype=sums).to(branch.bias.dtype) if need_bias else None
        gain = None
        if branch.gain is not None:
            gain = (g * before[i]).sum(0, dtype=sums).to(branch.gain.dtype) if need_gain else None
            g = grads[i] = gained(g, branch.gain)
        B = None
        if need_B:
            # (hᵀ g)ᵀ rather than gᵀ h: the library's product is faster with the thin matrix on the left.
            B = (hidden[i].t() @ g).t().to(branch.B.dtype) * branch.factor
        if branch.A is not None and (need_A or need_rows):
            back[i] = g @ branch.scaled(dtype)
        found.append(Gradients(bias, None, B, gain))
    found = [x._replace(A=A) for x, A in zip(found, _factor_gradients(rows, branches, back, [n[1] for n in needs]))]
    return (_input_gradient(rows, branches, grads, back) if need_rows else None), found


def _stacked(branches: Sequence[Branch], dtype: torch.dtype) -> Tensor | None:
    """All ``A_i`` as one (Σr, in) matrix, or None when a mask sets the inputs apart."""
    factors = [b.A for b in branches if b.A is not None]
    if not factors or any(b.dropout for b in branches):
        return None
    return factors[0].to(dtype) if len(factors) == 1 else torch.cat([A.to(dtype) for A in factors])


def _split(stacked: Tensor, branches: Sequence[Branch], dim: int) -> list[Tensor | None]:
    pieces = iter(stacked.split([b.A.shape[0] for b in branches if b.A is not None], dim))
    return [None if b.A is None else next(pieces) for b in branches]


def _mask(rows: Tensor, branch: Branch) -> Tensor:
    return keep_mask(branch.seed, tuple(rows.shape), branch.dropout, rows.dtype, rows.device)


def _dropped(rows: Tensor, branch: Branch) -> Tensor:
    return rows * _mask(rows, branch) if branch.dropout else rows


def _project(rows: Tensor, branches: Sequence[Branch]) -> list[Tensor | None]:
    A = _stacked(branches, rows.dtype)
    if A is not None:
        return _split(rows @ A.t(), branches, 1)
    return [None if b.A is None else _dropped(rows, b) @ b.A.to(rows.dtype).t() for b in branches]


def _factor_gradients(
    rows: Tensor, branches: Sequence[Branch], back: Sequence[Tensor | None], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """``(g B)ᵀ drop(x)`` of each branch: one product for all where no mask sets them apart."""
    taken = [i for i, want in enumerate(wanted) if want]
    found: list[Tensor | None] = [None] * len(branches)
    if len(taken) > 1 and not any(branches[i].dropout for i in taken):
        together = torch.cat([back[i] for i in taken], 1).t() @ rows
        for i, piece in zip(taken, together.split([branches[i].A.shape[0] for i in taken])):
            found[i] = piece.to(branches[i].A.dtype)
        return found
    for i in taken:
        found[i] = (back[i].t() @ _dropped(rows, branches[i])).to(branches[i].A.dtype)
    return found


def _input_gradient(
    rows: Tensor, branches: Sequence[Branch], grads: Sequence[Tensor], back: Sequence[Tensor | None]
) -> Tensor:
    """``Σ g_i W_i + m_i ∘ (g_i B_i) A_i``, every product added into the first."""
    dtype = rows.dtype
    total: Tensor | None = None
    for branch, g in zip(branches, grads):
        if branch.weight is not None:
            W = branch.dense(dtype)
            total = g @ W if total is None else total.addmm_(g, W)
    A = _stacked(branches, dtype)
    if A is not None:
        joined = [h for h in back if h is not None]
        h = joined[0] if len(joined) == 1 else torch.cat(joined, 1)
        return h @ A if total is None else total.addmm_(h, A)
    for branch, h in zip(branches, back):
        if h is None:
            continue
        through = h @ branch.A.to(dtype)
        if not branch.dropout:
            total = through if total is None else total.add_(through)
        elif total is None:
            total = through.mul_(_mask(rows, branch))
        else:
            total.addcmul_(through, _mask(rows, branch))
    assert total is not None
    return total
