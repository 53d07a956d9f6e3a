"""OwLore: blocks drawn by their outlier weights, each trained in a low-rank subspace of its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor, nn

from veneer.core.hook import Ranks
from veneer.core.registry import method
from veneer.core.site import Site, all_sites, stored
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.parts.drawn_blocks import DrawnBlocks
from veneer.parts.layerwise import layerwise

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

FLOOR = 1e-3  # least share of a block, over the number of blocks: none is out of reach


def outlier_share(W: Tensor, norms: Tensor, threshold: float) -> float:
    """D: how many of 100 weights have S_ij = |W_ij|·‖X_:j‖ above ``threshold`` times the mean of S.

    W: (out, in); norms: (in,), the 2-norm of every input column over the calibration tokens.
    """
    S = W.detach().float().abs() * norms
    return 100 * float(S.gt(threshold * S.mean()).float().mean())


class ColumnNorms:
    """Σ x² of every input column, padding left out."""

    def __init__(self, site: Site) -> None:
        self.square: Tensor | None = None

    def inputs(self, site: Site, x: Tensor, mask: Tensor | None) -> None:
        """Add one batch's."""
        rows = site.input_rows(x)
        found = (rows if mask is None else rows[mask.reshape(-1)]).float().square().sum(0)
        self.square = found if self.square is None else self.square + found

    def gradient(self, site: Site, x: Tensor, grad: Tensor) -> None:
        """Nothing is asked of gradients."""


@method(
    "owlore",
    axis="optim",
    paper="arXiv:2405.18380",
    system=30,
    defaults="full(norms=True)+galore(rank=256, gap=100, scale=1.0)",
)
class OwLore(DrawnBlocks, Ranks):
    """Train γ blocks at a time, those with more outlier weights more often, by GaLore (Li et al. 2024).

    Of a linear layer with input columns X_:j over the calibration batches, D = 100·#{S_ij > M·mean S}/(out·in) with
    S_ij = |W_ij|·‖X_:j‖₂; D_ℓ is the mean over a block's layers and p_ℓ = D_ℓ/ΣD. Before step t with K | t γ blocks are
    drawn, one after the other without replacement, with weights p; they train, and what lies outside the blocks; the
    others are frozen. GaLore's moments and subspace belong to the blocks that train.

    ==============  ============================  =====================================================
    tensor          trained                       state
    ==============  ============================  =====================================================
    in a block      while its block is drawn      GaLore's: p·r + 2·q·r, with p ≤ q the sides of a matrix
    outside         always, unless ``outside``    AdamW's
    ==============  ============================  =====================================================

    Defaults: γ = 5, K = 50, M = 13 (the shipped scores of LLaMA-2-7B), r = 256, T = 100, α = 1; rate 3e-4. ``mode`` has
    the code's other weights: ``uniform`` (LISA's), ``decrease`` and ``increase`` with the block's place, ``norm`` of
    its weights, ``owl-reverse`` (max p − p). The optimiser is a part of the recipe: "owlore+galore(rank=32, bits=8)"
    sets it, and on another form, "lora+owlore", there is none and AdamW serves.

    The published code lets no state go and a block that comes back uses an old subspace; here state goes with the block
    and its subspace is found anew at the first gradient. D_ℓ weighs a block's layers alike. A share of 0 is raised to
    1e-3/L, so that every block can be drawn. Scores are always those of the model at hand; they cost a forward over
    the calibration batches, and are kept as ``shares``. r is clamped to the shorter side of a matrix.
    """

    blocks: Annotated[int, At(ge=0, doc="γ, blocks that train at a time")] = 5
    period: Annotated[int | None, At(ge=1, doc="K, steps between two draws; a fiftieth of the run when None")] = 50
    threshold: Annotated[float, At(ge=0, doc="M, outliers exceed the mean this many times")] = 13.0
    mode: Annotated[
        Literal["owl", "uniform", "decrease", "increase", "norm", "owl-reverse"], At(doc="what weighs the blocks")
    ] = "owl"

    scores: dict[str, float] | None = None
    shares: dict[str, float] | None = None

    def survey(self, model: nn.Module, sites: list[Site], batches: list[Any]) -> None:
        """D, or the norm, of every block."""
        dense = [s for s in all_sites(model) if s.kind in ("linear", "conv") and not stored(s.module)]
        if self.mode == "norm":
            found = {s.path: float(s.weight().detach().float().norm()) for s in dense}
        else:
            watched = layerwise(model, dense, batches, ColumnNorms)
            found = {s.path: outlier_share(s.weight(), w.square.sqrt(), self.threshold) for s, w in watched}
        blocks = [path for path, _ in architecture.blocks(model)]
        members: dict[str, list[float]] = {}
        for s in dense:
            unit = next((b for b in blocks if s.path.startswith(f"{b}.")), s.module_path)
            if s.path in found:
                members.setdefault(unit, []).append(found[s.path])
        self.scores = {unit: sum(values) / len(values) for unit, values in members.items()}

    def on_attach(self, adapter: Adapter) -> None:
        super().on_attach(adapter)
        count = len(self.units)
        if self.mode in ("decrease", "increase"):
            self._share([float(count - i if self.mode == "decrease" else i + 1) for i in range(count)])
        elif self.scores is not None and self.mode != "uniform":
            self._share([self.scores.get(u, 0.0) for u in self.units])

    def _share(self, scores: list[float]) -> None:
        total = sum(scores)
        p = [s / total for s in scores] if total else [1 / len(scores) for _ in scores]
        if self.mode == "owl-reverse":
            p = [max(p) - own for own in p]
        p = [max(own, FLOOR / len(p)) for own in p]
        self.shares = {unit: own / sum(p) for unit, own in zip(self.units, p)}

    def weights(self) -> tuple[float, ...] | None:
        if self.mode == "uniform":
            return None
        if self.shares is None:
            raise UserError(
                "owlore has no scores to draw blocks by: attach it with calibration, or give mode='uniform'"
            )
        return tuple(self.shares[u] for u in self.units)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shares": self.shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shares = state.get("shares", self.shares)
