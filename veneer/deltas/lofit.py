"""LoFiT: choose attention heads, then train one offset vector at each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.adapter import Adapter
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.hook import Phase, Plan, Ranks, Run
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import normal


@method(
    "lofit",
    axis="delta",
    paper="arXiv:2406.01563",
    system=81,
    gives=("linear", "foldable", "frozen-base"),
    defaults="lofit-selection",
)
class LoFiT(Delta):
    """A scale or an offset on the output of single attention heads, before the output projection.

    z̃_i = (1 + a_i)∘z_i + v_i for the output z_i of head i (Yin et al. 2024, eqs. 2, 3). While heads are chosen (see
    ``lofit-selection``) every head has a and v = 0; afterwards the chosen ones have v and a = 0.

    =======  ==========  ==============  =============
    tensor   shape       trained         start
    =======  ==========  ==============  =============
    a        (H, d_h)    first phase     N(0, std²)
    v        (K_l, d_h)  second phase    N(0, std²)
    =======  ==========  ==============  =============

    H counts query heads. Defaults: std = 1e-3 as in the official code. Its rates are 5e-3 for a and 1e-2 for v (LLaMA-2
    7B, K = 32 of 1024 heads); more heads want less.

    It acts on the input of the output projection, so every attention implementation will do; the official code edits
    the attention class and adds vectors of zeros at the other heads. Offsets fold into the projection's bias, scales
    into its columns. Padding positions get the offset too, which their mask hides.
    """

    stage: Annotated[Literal["scale", "offset"], At(doc="whether a or v trains")] = "scale"
    heads: Annotated[tuple[int, ...] | None, At(doc="the query heads, from 0; all when None")] = None
    std: Annotated[float, At(ge=0, doc="standard deviation of the start")] = 1e-3

    usual_rate = 1e-2
    layers = ("linear",)
    starts_at_base = False
    reasons = {
        "starts_at_base": "the vectors start at N(0, std²) as published; std=0 starts at the base",
        "layers": "attention heads end in a linear layer",
    }

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The attention output projections among the selected layers."""
        found = [s for s in sites if s.kind == "linear" and s.role == "o" and s.rows is None]
        for s in found:
            if not s.heads or s.in_features % s.heads:
                raise UserError(f"lofit: the number of heads that end in {s.path} is not known from the model's config")
        return found

    def slots(self) -> Iterable[Slot]:
        name = "a" if self.stage == "scale" else "v"
        yield Slot(name, "diagonal", (len(self._chosen()), self._width()), normal(self.std))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        x = x if self.stage == "offset" else torch.addcmul(x, x, self._spread(self.a).to(x.dtype))
        return base(x if self.stage == "scale" else x + self._spread(self.v).to(x.dtype))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.stage == "scale":
            return W * (1 + self._spread(self.a)), b
        shift = W @ self._spread(self.v)
        return W, shift if b is None else b + shift

    def weight(self, W: Tensor | None = None) -> Tensor:
        W = self.site.weight().float() if W is None else W
        return self.fold(W, None)[0] - W

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        """A change of the bias beside a pair of zeros; None for scales, which have the rank of W."""
        if self.stage == "scale":
            return None
        return LoRAForm(W.new_zeros(1, W.shape[1]), W.new_zeros(W.shape[0], 1), 1.0, W @ self._spread(self.v))

    def parameter_count(self) -> int:
        """d_h for each head."""
        return len(self._chosen()) * self._width()

    def _chosen(self) -> tuple[int, ...]:
        return tuple(range(self.site.heads)) if self.heads is None else self.heads

    def _width(self) -> int:
        return self.site.in_features // self.site.heads

    def _spread(self, vectors: Tensor) -> Tensor:
        """One vector (in,) with each head's in its place and zeros at the heads that are not chosen."""
        if self.heads is None:
            return vectors.flatten()
        at = torch.tensor(self.heads, device=vectors.device)
        return vectors.new_zeros(self.site.heads, self._width()).index_copy(0, at, vectors).flatten()


@method("lofit-selection", axis="ranks", paper="arXiv:2406.01563", system=81, defaults="lofit")
class LoFiTSelection(Ranks):
    """LoFiT's first phase: scale all heads under an L1 penalty, keep the K whose scales grew most, forget the scales.

    The loss gets λ·Σ|a|, the score of head i of layer l is ‖a_{l,i}‖₂ (Yin et al. 2024, §3.1). The heads kept get new
    offsets, which train in the second phase without penalty; other layers lose their adapter. Trains nothing itself.

    Defaults: λ = 5e-4 (official: 5e-4 to 5e-3 by task), K a tenth of all heads as in the official code (its runs keep
    about 3 %). Its two runs of five epochs are two halves of one here, the first at half the rate.
    """

    keep: Annotated[int | None, At(ge=1, doc="K, heads kept; a tenth of all when None")] = None
    penalty: Annotated[float, At(ge=0, doc="λ, weight of the L1 term while heads are chosen")] = 5e-4
    share: Annotated[float, At(gt=0, lt=1, doc="of the run's steps, for choosing heads")] = 0.5
    rate_factor: Annotated[float, At(gt=0, doc="on the run's rate while heads are chosen")] = 0.5

    reads_outputs = False

    def on_attach(self, adapter: Adapter) -> None:
        other = next((d for d in adapter.deltas.values() if not isinstance(d, LoFiT)), None)
        if other is not None:
            raise UserError(f"lofit-selection chooses attention heads for lofit, and {adapter.recipe} has {other.name}")

    def phases(self) -> list[Phase]:
        return [Phase("choose heads", self.share, ("a",)), Phase("train offsets", 1 - self.share, ("v",))]

    def groups(self, adapter: Adapter) -> list[dict[str, Any]]:
        """The scales at their own rate."""
        scales = [(n, p) for n, p in adapter.named_parameters() if n.endswith(".a")]
        group = {"params": [p for _, p in scales], "names": [n for n, _ in scales], "rate": self.rate_factor}
        return [group] if scales else []

    def loss(self, outputs: Any, batch: Any, run: Run) -> Tensor | None:
        scales = [d.a for d in self.adapter.deltas.values() if d.stage == "scale"]
        return self.penalty * torch.stack([a.abs().sum() for a in scales]).sum() if scales and self.penalty else None

    def scores(self) -> list[tuple[str, int, float]]:
        """(site path, head, ‖a‖₂) of every head, the largest first; of equal ones the earlier."""
        found = [
            (path, head, float(score))
            for path, d in self.adapter.deltas.items()
            for head, score in enumerate(d.a.detach().norm(dim=1))
        ]
        return sorted(found, key=lambda f: -f[2])

    def on_phase_end(self, phase: Phase) -> Plan | None:
        if phase.trainable != ("a",):
            return None
        ranked = self.scores()
        kept: dict[str, list[int]] = {path: [] for path in self.adapter.deltas}
        for path, head, _ in ranked[: self.keep or max(1, len(ranked) // 10)]:
            kept[path].append(head)
        return {path: {"stage": "offset", "heads": tuple(sorted(own))} if own else None for path, own in kept.items()}
