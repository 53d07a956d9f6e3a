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

    @property
    def factor(self) -> float:
        """The scale over the share of x that dropout leaves."""
        return self.scale / (1.0 - self.dropout)


class Factors(NamedTuple):
    """The factors of a group in the compute precision: all ``A_i`` as one (Σr, in) matrix, each ``s/(1 − p) · B_i``.

    They are small; backward makes them again, or is given those of forward.
    """

    A: Tensor | None
    B: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, branches: Sequence[Branch], dtype: torch.dtype) -> Factors:
        """Cast, scale and stack."""
        A = [b.A for b in branches if b.A is not None]
        B = (None if b.B is None else b.B if b.factor == 1.0 else b.B * b.factor for b in branches)
        return cls(
            (A[0] if len(A) == 1 else torch.cat(A)).to(dtype) if A else None,
            tuple(None if b is None else b.to(dtype) for b in B),
        )

    def split(self, stacked: Tensor, dim: int) -> list[Tensor | None]:
        """Each branch's share of something stacked as ``A`` is."""
        pieces = iter(stacked.split([b.shape[1] for b in self.B if b is not None], dim))
        return [None if b is None else next(pieces) for b in self.B]


class Gradients(NamedTuple):
    """Of one branch, each in the precision of its tensor; None where it is not asked for."""

    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None


def run(
    rows: Tensor, branches: Sequence[Branch], factors: Factors
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The outputs ``y`` (N, out) of ``rows`` (N, in), and what backward needs: ``h = drop(x) Aᵀ`` (N, r), and for a
    branch with a gain ``z`` (N, out), the output before gain and bias."""
    dtype = rows.dtype
    hidden = _project(rows, branches, factors)
    outputs: list[Tensor] = []
    before: list[Tensor | None] = []
    for branch, h, B in zip(branches, hidden, factors.B):
        b = None if branch.bias is None else branch.bias.to(dtype)
        late = branch.gain is not None or branch.weight is None
        y = None if branch.weight is None else F.linear(rows, branch.dense(dtype), None if late else b)
        if h is not None:
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
    factors: Factors,
    grads: Sequence[Tensor],
    hidden: Sequence[Tensor | None],
    before: Sequence[Tensor | None],
    need_rows: bool,
    needs: Sequence[tuple[bool, bool, bool, bool]],
) -> tuple[Tensor | None, list[Gradients]]:
    """The gradient of ``rows`` (N, in), and of each branch's bias, A, B and gain where ``needs`` says so.

    ``grads`` are those of the outputs (N, out); ``hidden`` and ``before`` are what `run` gave, where they are needed.
    """
    sums = torch.promote_types(rows.dtype, torch.float32)
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
            B = torch.empty_like(branch.B, memory_format=torch.contiguous_format).copy_((hidden[i].t() @ g).t())
            B = B if branch.factor == 1.0 else B.mul_(branch.factor)
        if branch.A is not None and (need_A or need_rows):
            back[i] = g @ factors.B[i]
        found.append(Gradients(bias, None, B, gain))
    found = [x._replace(A=A) for x, A in zip(found, _factor_gradients(rows, branches, back, [n[1] for n in needs]))]
    return (_input_gradient(rows, branches, factors, grads, back) if need_rows else None), found


def _mask(rows: Tensor, branch: Branch) -> Tensor:
    return keep_mask(branch.seed, tuple(rows.shape), branch.dropout, rows.dtype, rows.device)


def _dropped(rows: Tensor, branch: Branch) -> Tensor:
    return rows * _mask(rows, branch) if branch.dropout else rows


def _project(rows: Tensor, branches: Sequence[Branch], factors: Factors) -> list[Tensor | None]:
    if factors.A is None:
        return [None] * len(branches)
    if not any(b.dropout for b in branches):
        return factors.split(rows @ factors.A.t(), 1)
    shares = zip(branches, factors.split(factors.A, 0))
    return [None if A is None else _dropped(rows, b) @ A.t() for b, A in shares]


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
    rows: Tensor,
    branches: Sequence[Branch],
    factors: Factors,
    grads: Sequence[Tensor],
    back: Sequence[Tensor | None],
) -> Tensor:
    """``Σ g_i W_i + m_i ∘ (g_i B_i) A_i``, every product added into the first."""
    total: Tensor | None = None
    for branch, g in zip(branches, grads):
        if branch.weight is not None:
            W = branch.dense(rows.dtype)
            total = g @ W if total is None else total.addmm_(g, W)
    if factors.A is None:
        assert total is not None
        return total
    if not any(b.dropout for b in branches):
        joined = [h for h in back if h is not None]
        h = joined[0] if len(joined) == 1 else torch.cat(joined, 1)
        return h @ factors.A if total is None else total.addmm_(h, factors.A)
    for branch, h, A in zip(branches, back, factors.split(factors.A, 0)):
        if h is None:
            continue
        if not branch.dropout:
            total = h @ A if total is None else total.addmm_(h, A)
        elif total is None:
            total = (h @ A).mul_(_mask(rows, branch))
        else:
            total.addcmul_(h @ A, _mask(rows, branch))
    assert total is not None
    return total
