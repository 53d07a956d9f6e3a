"""Linear layers with a low-rank change that share one input: their products and gradients, without autograd.

``y_i = g_i ∘ (x W_iᵀ + s_i (drop_i(x) A_iᵀ) B_iᵀ) + b_i``. One layer is a group of one. The sharing saves products: the
``A_i`` run stacked, and the gradient of ``x`` is one sum that every product adds into. Layers with the same dropout and
the same seed drop the same numbers of ``x``, and so stay stacked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.kernels import linear as compiled
from veneer.numerics.dropout import keep_mask, windows


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
    def width(self) -> int:
        """Numbers that the layer puts out."""
        known = self.weight if isinstance(self.weight, Tensor) else self.B
        assert known is not None, "a function that gives the weight stands beside factors"
        return known.shape[0]

    @property
    def factor(self) -> float:
        """The scale over the share of x that dropout leaves."""
        return self.scale / (1.0 - self.dropout)


class Factors(NamedTuple):
    """The factors of a group in the compute precision: all ``A_i`` as one (Σr, in) matrix, each ``s/(1 − p) · B_i``.

    They are small; backward makes them again, or is given those of forward. Compiled code reads the branches' own, and
    so they stay None for a group that it takes.
    """

    A: Tensor | None
    B: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, branches: Sequence[Branch], dtype: torch.dtype) -> Factors:
        """Cast, scale and stack."""
        if compiled.takes(branches, dtype):
            return cls(None, (None,) * len(branches))
        A = [b.A for b in branches if b.A is not None]
        B = (None if b.B is None else b.B if b.factor == 1.0 else b.B * b.factor for b in branches)
        return cls(
            (A[0] if len(A) == 1 else torch.cat(A)).to(dtype) if A else None,
            tuple(None if b is None else b.to(dtype) for b in B),
        )

    def stack(self, members: Sequence[int]) -> Tensor:
        """The ``A_i`` of some branches, one below the other."""
        ranks = [0 if b is None else b.shape[1] for b in self.B]
        if sum(ranks[i] for i in members) == sum(ranks):
            return self.A
        return torch.cat([self.A[sum(ranks[:i]) : sum(ranks[: i + 1])] for i in members])


class Gradients(NamedTuple):
    """Of one branch, each in the precision of its tensor; None where it is not asked for."""

    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    gain: Tensor | None


def run(
    rows: Tensor, branches: Sequence[Branch], factors: Factors, into: Sequence[Tensor | None] | None = None
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The outputs ``y`` (N, out) of ``rows`` (N, in), and what backward needs: ``h = drop(x) Aᵀ`` (N, r), and for a
    branch with a gain ``z`` (N, out), the output before gain and bias.

    ``into``: where to write the outputs; rows may lie apart.
    """
    dtype = rows.dtype
    if _by_compiled_code(branches, factors, dtype):
        return compiled.run(rows, branches, _windows(rows, branches), into)
    hidden = _project(rows, branches, factors)
    outputs: list[Tensor] = []
    before: list[Tensor | None] = []
    for branch, h, B, out in zip(branches, hidden, factors.B, into or [None] * len(branches)):
        b = None if branch.bias is None else branch.bias.to(dtype)
        z = None
        if branch.gain is not None:
            z = _changed(rows, branch, None, h, B, None)
            y = gained(z, branch.gain, out)
            y = y if b is None else y.add_(b)
        else:
            y = _changed(rows, branch, b, h, B, out)
        outputs.append(y)
        before.append(z)
    return outputs, hidden, before


def _changed(
    rows: Tensor, branch: Branch, bias: Tensor | None, h: Tensor | None, B: Tensor | None, out: Tensor | None
) -> Tensor:
    """``x Wᵀ + h Bᵀ + b``, whatever of it there is; written into ``out`` if that is given."""
    if branch.weight is None:
        assert h is not None, "a branch has a weight or a change"
        y = torch.mm(h, B.t(), out=out)
        return y if bias is None else y.add_(bias)
    W = branch.dense(rows.dtype).t()
    if h is None:
        return torch.mm(rows, W, out=out) if bias is None else torch.addmm(bias, rows, W, out=out)
    # The change first: the product adds it in fp32. Added to a base already rounded to bf16, a change of less than half
    # of its last digit is lost, which is most of it while a run is young.
    y = torch.mm(h, B.t(), out=out).addmm_(rows, W)
    return y if bias is None else y.add_(bias)


def gained(z: Tensor, gain: Tensor, out: Tensor | None = None) -> Tensor:
    """``z ∘ gain`` as ``z + z·(gain − 1)``: in bf16 a gain near 1 would lose the digits in which it differs from 1."""
    return torch.addcmul(z, z, (gain - 1).to(z.dtype), out=out)


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
        need_bias, *_, need_gain = need
        g = grads[i]
        bias = g.sum(0, dtype=sums).to(branch.bias.dtype) if need_bias else None
        gain = None
        if branch.gain is not None:
            gain = (g * before[i]).sum(0, dtype=sums).to(branch.gain.dtype) if need_gain else None
            g = grads[i] = gained(g, branch.gain)
        found.append(Gradients(bias, None, None, gain))
    if _by_compiled_code(branches, factors, rows.dtype):
        kept = _windows(rows, branches)
        total, pairs = compiled.gradients(rows, branches, grads, hidden, kept, need_rows, needs)
        return total, [one._replace(A=A, B=B) for one, (A, B) in zip(found, pairs)]
    for i, (branch, (_, need_A, need_B, _)) in enumerate(zip(branches, needs)):
        g = grads[i]
        if need_B:
            # (hᵀ g)ᵀ rather than gᵀ h: the library's product is faster with the thin matrix on the left.
            B = torch.empty_like(branch.B, memory_format=torch.contiguous_format).copy_((hidden[i].t() @ g).t())
            found[i] = found[i]._replace(B=B if branch.factor == 1.0 else B.mul_(branch.factor))
        if branch.A is not None and (need_A or need_rows):
            back[i] = g @ factors.B[i]
    total: Tensor | None = None
    for members, mask in _courses(rows, branches):
        wanted = [i for i in members if needs[i][1]]
        if wanted:
            g = _joined([back[i] for i in wanted])
            together = g.t() @ (rows if mask is None else rows * mask)
            for i, piece in zip(wanted, together.split([branches[i].A.shape[0] for i in wanted])):
                found[i] = found[i]._replace(A=piece.to(branches[i].A.dtype))
        if need_rows:
            g = g if wanted == members else _joined([back[i] for i in members])
            total = _added(total, g, factors.stack(members), mask)
    return (_through_weights(total, rows.dtype, branches, grads) if need_rows else None), found


def _courses(rows: Tensor, branches: Sequence[Branch]) -> Iterator[tuple[list[int], Tensor | None]]:
    """The branches with a change, those together that see the input under one mask, and that mask (N, in) or None."""
    courses: dict[tuple[float, int | None], list[int]] = {}
    for i, b in enumerate(branches):
        if b.A is not None:
            courses.setdefault((b.dropout, b.seed if b.dropout else None), []).append(i)
    for (p, seed), members in courses.items():
        yield members, keep_mask(seed, tuple(rows.shape), p, rows.dtype, rows.device) if p else None


def _by_compiled_code(branches: Sequence[Branch], factors: Factors, dtype: torch.dtype) -> bool:
    """Whether `Factors.of` left a group to compiled code; a group without a change, which has no factors, is asked."""
    return factors.A is None and (any(b.A is not None for b in branches) or compiled.takes(branches, dtype))


def _windows(rows: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, Tensor] | None:
    """The dropout's windows of a group that compiled code takes, which all its branches share; None without dropout."""
    one = next((b for b in branches if b.A is not None and b.dropout), None)
    return None if one is None else windows(one.seed, tuple(rows.shape), one.dropout, rows.dtype, rows.device)


def _project(rows: Tensor, branches: Sequence[Branch], factors: Factors) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(branches)
    for members, mask in _courses(rows, branches):
        h = (rows if mask is None else rows * mask) @ factors.stack(members).t()
        for i, piece in zip(members, h.split([branches[i].A.shape[0] for i in members], 1)):
            found[i] = piece
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _through_weights(
    total: Tensor | None, dtype: torch.dtype, branches: Sequence[Branch], grads: Sequence[Tensor]
) -> Tensor | None:
    """``Σ g_i W_i`` added into ``total``, or alone; as it was where no branch has a weight."""
    for branch, g in zip(branches, grads):
        if branch.weight is not None:
            W = branch.dense(dtype)
            total = g @ W if total is None else total.addmm_(g, W)
    return total


def _added(total: Tensor | None, g: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    """``mask ∘ (g A)`` added into ``total``, or alone."""
    if mask is None:
        return g @ A if total is None else total.addmm_(g, A)
    return (g @ A).mul_(mask) if total is None else total.addcmul_(g @ A, mask)
