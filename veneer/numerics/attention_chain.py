"""Attention and its gradient as a chain of thin matrices, in time linear in the length (arXiv:2406.03136, system 15).

One head: Q, K, V (L, h), S = β·QKᵀ, P = softmax(S), O = PV, and G = ∂loss/∂O. With ρᵢ = Gᵢ·Oᵢ

    dS = P ∘ (GVᵀ − ρ1ᵀ),    dQ = β·dS·K,    dK = β·dSᵀ·Q,    dV = PᵀG.

For P ≈ UFᵀ with U, F (L, m), P ∘ (GVᵀ − ρ1ᵀ) is (U ⊙ [G, −ρ])(F ⊙ [V, 1])ᵀ, ⊙ the row-wise Kronecker product: a matrix
of rank m·(h + 1) that is never formed. Everything is then a product with one of the tensors

    T_abc = Σ_j F_ja [V, 1]_jb K_jc    and    T′_abc = Σ_i U_ia [G, −ρ]_ib Q_ic,    both (m, h + 1, h),

at L·m·h² operations. Under a causal mask rows go in chunks: within a chunk P is exact, and of the earlier (in backward:
the later) chunks the running T is all that is kept. It is faster than L²·h where L is well above m·h.

U and F come from features φ with φ(q)·φ(k) ≈ exp(β·q·k): positive random ones (Choromanski et al. 2021), Taylor's
monomials, or Nyström's from landmarks among the tokens (as in Xiong et al. 2021, but of the kernel itself). How many a
given accuracy takes grows steeply with the scores: the theorem's threshold, in practice. All functions take leading
dimensions (batch, heads). The chunks and the joint normalisation of near and far are ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.errors import UserError

ROWS = 64  # of a chunk
MOST_MONOMIALS = 20_000

Features = Callable[[Tensor], tuple[Tensor, Tensor]]  # x (…, L, h) → φ (…, L, m) and s (…, L, 1): features are φ·eˢ


class Gradients(NamedTuple):
    """By queries, keys and values, each (…, L, h)."""

    q: Tensor
    k: Tensor
    v: Tensor


class Map(NamedTuple):
    """An attention map: U·Fᵀ between chunks of ``rows`` rows, ``near`` within them; without ``near`` U·Fᵀ throughout.

    With ``near`` (a matrix a chunk, (…, c, c)) the map is causal, and U·Fᵀ holds for earlier chunks alone.
    """

    U: Tensor
    F: Tensor
    near: tuple[Tensor, ...] = ()
    rows: int = ROWS

    def chunks(self) -> list[slice]:
        """The rows of each chunk."""
        return [slice(i, i + self.rows) for i in range(0, self.U.shape[-2], self.rows)]


# -- the gradients -----------------------------------------------------------------------------------------------------


def exact(q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: float, causal: bool = False) -> Gradients:
    """The gradients from the whole map, in L²·h operations."""
    P = softmax_map(q, k, beta, causal)
    rho = (G * (P @ v)).sum(-1, keepdim=True)
    dS = P * (G @ v.mT - rho)
    return Gradients(beta * dS @ k, beta * dS.mT @ q, P.mT @ G)


def softmax_map(q: Tensor, k: Tensor, beta: float, causal: bool = False) -> Tensor:
    """P (…, L, L)."""
    S = beta * q @ k.mT
    return (S + _future(S) if causal else S).softmax(-1)


def output(P: Map, v: Tensor) -> Tensor:
    """O = P·V."""
    O = torch.empty_like(v)
    for n, rows, state in _running(P, lambda at: P.F[..., at, :].mT @ v[..., at, :]):
        O[..., rows, :] = P.U[..., rows, :] @ state
        if P.near:
            O[..., rows, :] += P.near[n] @ v[..., rows, :]
    return O


def chained(P: Map, q: Tensor, k: Tensor, v: Tensor, G: Tensor, beta: float) -> Gradients:
    """The gradients for a map in factors, exact where it is: no (L, L) matrix is formed."""
    V = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    G_rho = torch.cat([G, -(G * output(P, v)).sum(-1, keepdim=True)], -1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for n, rows, T in _running(P, lambda at: _outer(P.F, V, at).mT @ k[..., at, :]):
        dq[..., rows, :] = _outer(P.U, G_rho, rows) @ T
        if P.near:
            dq[..., rows, :] += _near(P, n, rows, G_rho, V) @ k[..., rows, :]
    sums = _running(P, lambda at: _outer(P.U, G_rho, at).mT @ q[..., at, :], backwards=True)
    for n, rows, T in sums:
        dk[..., rows, :] = _outer(P.F, V, rows) @ T
        if P.near:
            dk[..., rows, :] += _near(P, n, rows, G_rho, V).mT @ q[..., rows, :]
    for n, rows, state in _running(P, lambda at: P.U[..., at, :].mT @ G[..., at, :], backwards=True):
        dv[..., rows, :] = P.F[..., rows, :] @ state
        if P.near:
            dv[..., rows, :] += P.near[n].mT @ G[..., rows, :]
    return Gradients(beta * dq, beta * dk, dv)


def of_factors(dZ: Tensor, X: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(dA (r, d), dB (h, r)) of Z = X·(W + s·BA)ᵀ from dZ (L, h) and X (L, d): two more links of the chain."""
    return scale * (dZ @ B).mT @ X, scale * dZ.mT @ (X @ A.mT)


def _outer(left: Tensor, right: Tensor, rows: slice) -> Tensor:
    """left ⊙ right of some rows: (…, c, m·w)."""
    return (left[..., rows, :, None] * right[..., rows, None, :]).flatten(-2)


def _near(P: Map, n: int, rows: slice, G_rho: Tensor, V: Tensor) -> Tensor:
    """dS/β within a chunk, (…, c, c)."""
    return P.near[n] * (G_rho[..., rows, :] @ V[..., rows, :].mT)


def _running(
    P: Map, part: Callable[[slice], Tensor], backwards: bool = False
) -> Iterator[tuple[int, slice, Tensor | float]]:
    """Each chunk with the sum of ``part`` over those before it (after it, ``backwards``); over all without a mask."""
    chunks = list(enumerate(P.chunks()))
    if not P.near:
        total = sum(part(rows) for _, rows in chunks)
        yield from ((n, rows, total) for n, rows in chunks)
        return
    state: Tensor | None = None
    for n, rows in reversed(chunks) if backwards else chunks:
        own = part(rows)
        state = torch.zeros_like(own) if state is None else state
        yield n, rows, state
        state = state + own


def _future(S: Tensor) -> Tensor:
    """−∞ above the diagonal."""
    return torch.full_like(S, -torch.inf).triu(1)


# -- maps in factors ---------------------------------------------------------------------------------------------------


def approximate(q: Tensor, k: Tensor, beta: float, features: Features, causal: bool = False, rows: int = ROWS) -> Map:
    """softmax(β·QKᵀ) in factors made of ``features``; under a mask, exact within chunks of ``rows``."""
    (phi, s), (psi, t) = features(q * beta**0.5), features(k * beta**0.5)
    top = t.amax((-2, -1), keepdim=True)
    F = psi * (t - top).exp()
    if not causal:
        return Map(phi / (phi @ F.sum(-2, keepdim=True).mT), F, (), rows)
    U, near, plan = torch.empty_like(phi), [], Map(phi, F, (phi,), rows)
    for _, at, seen in _running(plan, lambda at: F[..., at, :].sum(-2, keepdim=True).mT):
        S = beta * q[..., at, :] @ k[..., at, :].mT
        S = S + _future(S)
        far = (phi[..., at, :] @ seen).clamp_min(0).log() + s[..., at, :] + top  # log of the earlier chunks' weight
        high = torch.maximum(S.amax(-1, keepdim=True), far)
        E = (S - high).exp()
        Z = E.sum(-1, keepdim=True) + (far - high).exp()
        near.append(E / Z)
        U[..., at, :] = phi[..., at, :] * ((s[..., at, :] + top - high).exp() / Z)
    return Map(U, F, tuple(near), rows)


def random_features(width: int, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Features:
    """φ(x) = exp(w·x − ‖x‖²/2)/√m for w of N(0, I): positive, and exp(q·k) on average; the largest is taken out."""
    W = torch.randn(count, width, generator=generator, dtype=dtype)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        logs = x @ W.mT.to(x) - x.square().sum(-1, keepdim=True) / 2 - math.log(count) / 2
        top = logs.amax(-1, keepdim=True)
        return (logs - top).exp(), top

    return features


def taylor_features(width: int, degree: int) -> Features:
    """All monomials x^α/√α! up to ``degree``: φ(q)·φ(k) is exp's Taylor polynomial of q·k. An even degree is positive.

    Raises:
        UserError: there are more than can be held.
    """
    count = math.comb(width + degree, degree)
    if count > MOST_MONOMIALS:
        raise UserError(
            f"Taylor features of degree {degree} for heads of width {width} are {count:,} monomials; "
            f"{MOST_MONOMIALS:,} at most are made: take a lower degree, or random features"
        )
    factors = [a for n in range(degree + 1) for a in combinations_with_replacement(range(width), n)]
    weights = [math.prod(math.factorial(c) for c in Counter(a).values()) ** -0.5 for a in factors]
    at = torch.tensor([[*a, *[width] * (degree - len(a))] for a in factors], dtype=torch.long)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        padded = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        phi = torch.tensor(weights, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1)
        for column in at.T.to(x.device):
            phi = phi * padded[..., column]
        return phi, torch.zeros_like(x[..., :1])

    return features


def nystrom_features(q: Tensor, k: Tensor, beta: float, count: int, ridge: float = 1e-6) -> Features:
    """Features from ``count`` landmarks Z among the rows of q and k (…, L, h), evenly spaced, half of each.

    With the kernel κ(x, z) = exp(−‖x − z‖²/2), of which exp(x·y) is κ(x, y)·exp(‖x‖²/2 + ‖y‖²/2):
    φ(x) = κ(x, Z)·(κ(Z, Z) + ridge)^-½, exact where every row is a landmark. Features may be negative, so that a map is
    only as good as its landmarks; chosen over the whole length, they know of later tokens even under a causal mask.

    Raises:
        UserError: more landmarks than rows, or fewer than 2.
    """
    length = q.shape[-2]
    if not 2 <= count <= 2 * length:
        raise UserError(f"{count} landmarks among {length} queries and {length} keys; 2 to {2 * length} can be taken")
    own, others = (torch.linspace(0, length - 1, n).round().long() for n in (count - count // 2, count // 2))
    Z = beta**0.5 * torch.cat([q[..., own.to(q.device), :], k[..., others.to(k.device), :]], -2)
    values, vectors = torch.linalg.eigh(_gaussian(Z, Z).double())
    root = (vectors * values.clamp_min(0).add(ridge).rsqrt()[..., None, :]) @ vectors.mT

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        phi = _gaussian(x, Z.to(x)).double() @ root
        return phi.to(x), x.square().sum(-1, keepdim=True) / 2

    return features


def _gaussian(x: Tensor, z: Tensor) -> Tensor:
    """exp(−‖x − z‖²/2) of all pairs, (…, rows of x, rows of z)."""
    squares = x.square().sum(-1, keepdim=True) + z.square().sum(-1)[..., None, :] - 2 * x @ z.mT
    return (-squares.clamp_min(0) / 2).exp()


# -- as an attention ---------------------------------------------------------------------------------------------------


def linear_time_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    beta: float | None = None,
    causal: bool = False,
    rows: int = ROWS,
    exact_output: bool = False,
) -> Tensor:
    """softmax(β·QKᵀ)V (…, L, h) of q, k, v (…, L, h) from the map in factors; its backward is the chain.

    β is 1/√h when not given. ``exact_output`` gives the exact O, in L² operations, with the chain's gradient all the
    same: for studying what the approximate gradient does. Computes in the inputs' own precision; fp32 at least.
    """
    beta = q.shape[-1] ** -0.5 if beta is None else beta
    return _Attention.apply(q, k, v, beta, features, causal, rows, exact_output)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: float, features: Features, *how: Any) -> Tensor:
        causal, rows, exact_output = how
        P = approximate(q, k, beta, features, causal, rows)
        ctx.save_for_backward(q, k, v, P.U, P.F, *P.near)
        ctx.beta, ctx.rows = beta, rows
        return softmax_map(q, k, beta, causal) @ v if exact_output else output(P, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Any, ...]:
        q, k, v, U, F, *near = ctx.saved_tensors
        return *chained(Map(U, F, tuple(near), ctx.rows), q, k, v, G, ctx.beta), *[None] * 5
