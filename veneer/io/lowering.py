"""Any form that folds as plain LoRA, with ranks chosen from the error allowed.

A change that is a pair stays one, exactly, or is compressed by QR of its factors and an SVD of their small core. Every
other is formed densely, one layer at a time: once for its spectrum, once for its leading directions. Over all layers
the components with the least σ² for each number they cost, (in + out), are left out until the allowed error is used up:
‖ΔW − ΔW′‖_F ≤ tolerance·‖ΔW‖_F, both norms over all layers together. The error reported of a dense change is measured
on the factors written, that of a pair is what its spectrum loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, Offset, Written
from veneer.core.site import Site, site_at
from veneer.errors import UserError
from veneer.io.plain import Factors, by_layer, exact, joined
from veneer.models import architecture
from veneer.numerics import factored
from veneer.numerics.svd import truncated_svd
from veneer.parts.folding import trained_in_place

TARGET = "plain LoRA"
EXACT_UP_TO = 1536  # shorter side of a matrix beyond which a given rank is reached by a randomised SVD


@dataclass(frozen=True)
class Row:
    """One layer of a lowered adapter: its rank, and what it lost of what it had, as Frobenius norms."""

    path: str
    rank: int
    norm: float
    error: float
    exact: bool

    @property
    def relative(self) -> float:
        """‖ΔW − ΔW′‖_F / ‖ΔW‖_F, 0 where there is no change."""
        return self.error / self.norm if self.norm else 0.0


@dataclass
class Lowered:
    """Factors of every layer, what each lost, and the base tensors whose change is in the factors."""

    factors: list[Factors]
    rows: list[Row]
    within: set[str] = field(default_factory=set)

    @property
    def error(self) -> float:
        """‖ΔW − ΔW′‖_F / ‖ΔW‖_F over all layers together."""
        norm = sum(r.norm**2 for r in self.rows) ** 0.5
        return sum(r.error**2 for r in self.rows) ** 0.5 / norm if norm else 0.0


@torch.no_grad()
def lower(adapter: Adapter, rank: int | None = None, tolerance: float | None = None) -> Lowered:
    """The adapter as plain LoRA.

    Args:
        adapter: any whose changes are of layers and fold; it stays as it is.
        rank: the largest rank of a layer, ≥ 1.
        tolerance: the relative Frobenius error allowed over all layers, in [0, 1); the smallest ranks that keep it.
            With both, a ``rank`` that does not reach it is an error. With neither the change must be exact pairs.

    Raises:
        UserError: for a form that does not fold or changes no layer's weight, with the nearest offer.
    """
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank} was given; plain LoRA has at least rank 1")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UserError(f"tolerance={tolerance} was given; a relative error in [0, 1) was expected")
    if not adapter.keep_base and any(d.replaces for d in adapter.deltas.values()):
        raise UserError("keep_base=False dropped the weights that this adapter would be compared with; keep them")
    layers = _layers(adapter, written=rank is not None or tolerance is not None)
    if not layers and _layers(adapter, written=True):
        raise UserError(
            f"{adapter.recipe} trains whole weights, whose change is of full rank; give rank= or tolerance= for the "
            'nearest pair, or export with format="merged" the folded model'
        )
    if not layers:
        raise UserError(
            f"{adapter.recipe} changes no layer's weight, so that plain LoRA has nothing to hold; export with "
            'format="peft" or "merged"'
        )
    if rank is None and tolerance is None:
        for layer in layers:
            if layer.pair is None:
                raise UserError(
                    f"{layer.name} at {layer.path} is not plain LoRA; give rank= or tolerance= for the nearest pair, "
                    'or export with format="merged" the folded model'
                )
    ranks = _allotted(layers, tolerance, rank)
    done = [layer.lowered(ranks.get(layer.path, rank), quick=tolerance is None) for layer in layers]
    found = Lowered([f for f, _ in done], [r for _, r in done], {n for layer in layers for n in layer.within})
    if tolerance is not None and rank is not None and found.error > max(tolerance, 1e-6):
        raise UserError(
            f"rank={rank} leaves a relative error of {found.error:.3g}, more than tolerance={tolerance:g}; give a "
            "larger rank or tolerance"
        )
    return found


class _Layer:
    """One layer's change: an exact pair, or a dense matrix that is formed whenever it is asked for."""

    def __init__(self, adapter: Adapter, path: str, deltas: list[Delta], written: Written | None) -> None:
        self.adapter, self.path, self.deltas, self.written = adapter, path, deltas, written
        self.site: Site = site_at(adapter.model, path)
        self.name = deltas[0].name if deltas else "full"
        self.within = {f"{path}.weight"} if written is not None else set()
        self.pair = self._exact()

    def _exact(self) -> Factors | None:
        if self.written is not None:
            return None
        with trained_in_place(self.adapter):
            found = [exact(d) for d in self.deltas]
        return None if any(f is None for f in found) else joined(self.adapter, self.path, found)

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """ΔW (out, in) and the change of the bias (out,) or None, in fp32."""
        total = torch.zeros(self.site.out_features, self.site.in_features, device=self.site.weight().device)
        shift = None
        if self.written is not None:
            base = self.site.weight().detach().float()  # the tensor itself, not the parameter, whose data is exchanged
            with trained_in_place(self.adapter):
                total += self.site.weight().float() - base
        with trained_in_place(self.adapter):
            for delta in self.deltas:
                rows = slice(None) if delta.site.rows is None else delta.site.rows
                change, bias = _folded(delta)
                total[rows] += change
                if bias is not None:
                    shift = total.new_zeros(self.site.out_features) if shift is None else shift
                    shift[rows] = bias
        return total, shift

    def squares(self) -> Tensor:
        """The squared singular values of ΔW, descending, fp64."""
        if self.pair is not None:
            return (factored.singular_values(self.pair.A, self.pair.B) * abs(self.pair.scale)).square()
        return torch.linalg.eigvalsh(_gram(self.dense()[0])).flip(0).clamp_min(0)

    def lowered(self, rank: int | None, quick: bool) -> tuple[Factors, Row]:
        """The nearest pair of at most ``rank``, near it when ``quick``; the pair as it is where that does."""
        if self.pair is not None:
            return self._compressed(rank)
        change, bias = self.dense()
        norm = float(torch.linalg.vector_norm(change.double()))
        assert rank is not None, "a dense change is given a rank"
        if quick and min(change.shape) > EXACT_UP_TO:
            U, S, Vh = truncated_svd(change, rank)
            A, B = S.sqrt()[:, None] * Vh, U * S.sqrt()
        else:
            A, B = _nearest(change, rank)
        error = float(torch.linalg.vector_norm((change - B @ A).double()))
        extras = {"lora_B.bias": bias} if bias is not None and bool(bias.any()) else {}
        return Factors(self.site, A, B, 1.0, extras), Row(self.path, len(A), norm, error, False)

    def _compressed(self, rank: int | None) -> tuple[Factors, Row]:
        pair = self.pair
        assert pair is not None, "a pair is compressed"
        norm = abs(pair.scale) * float(factored.frobenius_norm(pair.A, pair.B))
        if rank is None or rank >= pair.rank:
            return pair, Row(self.path, pair.rank, norm, 0.0, True)
        A, B, error = factored.recompress(pair.A, pair.B, rank=rank)
        return Factors(pair.site, A, B, pair.scale, pair.extras), Row(self.path, len(A), norm, error * norm, False)


def _gram(change: Tensor) -> Tensor:
    """The smaller of ΔWΔWᵀ and ΔWᵀΔW, fp64."""
    wide = change.double()
    return wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide


def _nearest(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair A (r, in), B (out, r) nearest to ΔW, balanced: its projection on the leading eigenvectors of the Gram
    matrix, so that no small singular value divides."""
    squares, vectors = torch.linalg.eigh(_gram(change))
    squares, vectors = squares.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    root = squares.sqrt().sqrt().clamp_min(torch.finfo(torch.float32).tiny)  # √σ, of zeros as small as fp32 divides by
    if change.shape[0] <= change.shape[1]:
        return ((vectors.T @ change.double()) / root[:, None]).float(), (vectors * root).float()
    return (vectors * root).T.float().contiguous(), ((change.double() @ vectors) / root).float()


def _layers(adapter: Adapter, written: bool) -> list[_Layer]:
    """The layers whose weight changes; those whose tensor trains as it is only where ``written`` asks for them."""
    deltas: Mapping[str, list[Delta]] = by_layer(adapter, TARGET)
    for parts in deltas.values():
        stiff = next((d for d in parts if not d.folds), None)
        if stiff is not None:
            why = stiff.reasons.get("folds", "its change is not a matrix")
            raise UserError(f"{stiff.name} cannot become plain LoRA: {why}; save it in Veneer's own format")
    tied = {name for group in architecture.tied(adapter.model) for name in group}
    tensors: dict[str, Written] = {}
    for path, d in adapter.every().items() if written else ():
        owner, _, last = path.rpartition(".")
        if isinstance(d, Written) and last == "weight" and path not in tied and _is_layer(adapter, owner):
            tensors[owner] = d
    return [_Layer(adapter, p, deltas.get(p, []), tensors.get(p)) for p in dict.fromkeys([*deltas, *tensors])]


def _is_layer(adapter: Adapter, path: str) -> bool:
    site = site_at(adapter.model, path)
    return site.kind in ("linear", "conv", "embedding") and site.factored()


def _folded(delta: Delta) -> tuple[Tensor, Tensor | None]:
    """ΔW (out, in) and Δb (out,) of one site, from W as it lies beneath."""
    W, b = delta.site.weight().float(), delta.site.bias()
    start = b = b if b is None else b.float()
    total = torch.zeros_like(W)
    for link in delta.under():
        if isinstance(link, Offset) or type(link).fold is Delta.fold:
            change = link.weight(W)  # W + ΔW − W would round a small change
        else:
            new, b = link.fold(W, b)
            change = new - W
        total, W = total + change, W + change
    return total, b if start is None or b is None else b - start


def _allotted(layers: list[_Layer], tolerance: float | None, cap: int | None) -> dict[str, int]:
    """The rank of each layer that leaves out at most ``tolerance`` of all changes' norm, with the fewest numbers."""
    if tolerance is None:
        return {}
    squares = [layer.squares() for layer in layers]
    cost = [layer.site.in_features + layer.site.out_features for layer in layers]
    value = torch.cat([s / c for s, c in zip(squares, cost, strict=True)])
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(squares)]).tolist()
    every = torch.cat(squares).tolist()
    left, left_out = tolerance**2 * sum(every), [0] * len(layers)
    for i in value.argsort().tolist():  # within a layer the squares rise, so that one which is too much ends it
        if every[i] <= left:
            left -= every[i]
            left_out[owner[i]] += 1
    ranks = {}
    for layer, s, gone in zip(layers, squares, left_out, strict=True):
        significant = int((s > s[0] * torch.finfo(torch.float64).eps * len(s)).sum()) if len(s) else 0
        kept = max(1, min(len(s) - gone, significant))
        ranks[layer.path] = kept if cap is None else min(kept, cap)
    return ranks
