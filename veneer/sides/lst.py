"""Ladder side-tuning: a thin network beside a frozen trunk, with no backward pass through the trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.delta import Delta, Slot
from veneer.core.hook import Init
from veneer.core.registry import method
from veneer.core.site import Site, all_sites
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance
from veneer.parts import thin, trunk
from veneer.parts.evidence import gather

if TYPE_CHECKING:
    from veneer.core.adapted import Base
    from veneer.core.adapter import Adapter
    from veneer.core.recipe import Recipe


@method("lst", axis="side", paper="arXiv:2206.06522", system=126, gives=("frozen-base",))
class LST(Delta):
    """Thin copies of the blocks read the frozen trunk's hidden states through ladders and speak through its head.

    s = D₀h₀; for each kept block i: s ← gᵢ·s + (1 − gᵢ)·Dᵢhᵢ₊₁, s ← Sᵢ(s); output U·norm(s), with gᵢ = σ(αᵢ/T) and
    hᵢ₊₁ what block i of the trunk puts out, without gradient (Sung, Cho & Bansal 2022). Sᵢ is a block of the model's
    own class with all widths divided by r and as many heads, under the masks and positions of the same call.

    ============  ====================  =========  =======================================
    tensor        shape                 trained    start
    ============  ====================  =========  =======================================
    down, bias    (K + 1, d/r, d)       yes        U(±1/√d), torch's default
    side          K blocks over r       yes        rows and columns of the trunk's blocks
    alpha         (K,), 1 more merged   yes        0, so g = 1/2; merged ``merge_alpha``
    norm          the trunk's, d/r      yes        entries of the trunk's last norm
    up, bias      (d, d/r)              yes        U(±1/√(d/r))
    ============  ====================  =========  =======================================

    Structural pruning chooses what a side block starts from: through the layers in the order in which they run, the
    inputs that survived select columns and the heaviest 1/r of rows by Σ importance survive. The importance is |W|, or
    the Fisher information with ``lst+lst-fisher``, the paper's, which wants calibration batches (of one row each there)
    and a backward pass through the base.

    Defaults: r = 8 and T = 0.1 as for GLUE (r = 4 for vision and language). All blocks are kept; the paper leaves out
    every fourth, or every other, of T5. Otherwise than there: the trunk runs under no_grad; rows of q, k and v are
    chosen within heads, so that heads stay heads, with grouped queries; where positions turn the heads, the same pairs
    in all heads of a block, and the side turns them by the trunk's own angles; ``merge_alpha`` = −1 starts next to the
    base, where the paper has 0. Decoding keeps the side's keys and values in a cache that hangs on the call's.
    Trunks that normalise after each block (BERT) have no last norm, and neither has the side.
    """

    axis = "side"
    layers = ("module",)
    starts_at_base = False
    folds = False
    encoder_decoder = False
    reasons = {
        "starts_at_base": "the output comes from the side network, which has learned nothing yet",
        "folds": "a network beside the trunk is no change of its weights",
        "encoder_decoder": "the side of a decoder would have to attend to the side of the encoder",
    }

    reduction: Annotated[int, At(ge=1, doc="r, by which every width is divided")] = 8
    blocks: Annotated[tuple[int, ...] | None, At(doc="blocks that have a side block, from 0; all when None")] = None
    temperature: Annotated[float, At(gt=0, doc="T of the gates")] = 0.1
    start: Annotated[Literal["magnitude", "random"], At(doc="where the side blocks start")] = "magnitude"
    mix_after: Annotated[bool, At(doc="let the ladder in after the side block, not before it")] = False
    merge_last: Annotated[bool, At(doc="mix the output with the trunk's own by one more gate")] = False
    merge_alpha: Annotated[float, At(doc="α of that gate at the start")] = -1.0
    dropout: Annotated[float, At(ge=0, lt=1, doc="before U, in training only")] = 0.0

    @classmethod
    def takes(cls, site: Site) -> bool:
        """The trunk."""
        return site.kind == "module"

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The trunk, whatever is selected."""
        return [trunk.place(model, "lst")]

    # -- building

    @property
    def width(self) -> tuple[int, int]:
        """(d, d/r)."""
        d = architecture.hidden_size(self.site.module)
        return d, d // self.reduction

    @cached_property
    def kept(self) -> list[int]:
        """The indices of the blocks that have a side block, ascending."""
        count = len(architecture.blocks(self.site.module))
        wrong = [i for i in self.blocks or () if not 0 <= i < count]
        if wrong or self.blocks == ():
            raise UserError(f"lst: blocks={self.blocks} must name some of the {count} blocks, 0 to {count - 1}")
        return list(range(count)) if self.blocks is None else sorted(set(self.blocks))

    def slots(self) -> Iterable[Slot]:
        d, s = self.width
        ladders, merged = len(self.kept) + 1, int(self.merge_last)
        yield Slot("down", "factor_a", (ladders, s, d), chance.kaiming_uniform)
        yield Slot("down_bias", "bias", (ladders, s), _bound(d))
        yield Slot("alpha", "gate", (ladders - 1 + merged,), _last(self.merge_alpha * merged))
        yield Slot("up", "factor_b", (d, s), chance.kaiming_uniform)
        yield Slot("up_bias", "bias", (d,), _bound(s))

    def build(self) -> None:
        module, r = self.site.module, self.reduction
        config, every = thin.thin_config(module, r), architecture.blocks(module)
        self.side = nn.ModuleList(thin.thin_block(every[i][1], config, i, self.generator("side", i)) for i in self.kept)
        last = thin.last_norm(module)
        self.norm = nn.Identity() if last is None else thin.thin_norm(last, self.width[1])
        self.turned = thin.turns(module)
        if self.turned:
            half = architecture.head_dim(module) // 2
            pairs = torch.arange(half // r) * r
            self.register_buffer("turn", torch.cat([pairs, pairs + half]).repeat(len(self.kept), 1))
        self.to(self.site_device())
        if self.start == "magnitude":
            self.prune(lambda site: site.weight().float().abs())

    def prune(self, importance: thin.Importance) -> None:
        """Start the side blocks and the norm from what survives of the trunk's."""
        norm = None if isinstance(self.norm, nn.Identity) else self.norm
        heads = thin.prune(self.site.module, dict(zip(self.kept, self.side)), norm, self.reduction, importance)
        if self.turned:
            self.turn.copy_(torch.stack(heads))

    @classmethod
    def check_recipe(cls, recipe: Recipe) -> None:
        """Refuse a form in the trunk: it would get no gradient."""
        form = recipe.part("delta")
        if form is not None:
            raise UserError(
                f"lst runs the trunk without gradient, so {form.method.name} inside it would not learn: "
                "attach it before as an adapter of its own, or leave it out"
            )

    def members(self) -> Iterable[Delta]:
        """None: the side is no delta of the recipe's form."""
        return ()

    # -- running

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        module = self.site.module
        trace = trunk.states(module, base, (x, *args), kwargs, cache=f"veneer_{self.adapter_name}")
        h, gates = trace.states, (self.alpha / self.temperature).sigmoid()
        ladders = list(zip(*(t.unbind() for t in self.cast(h[0], self.down, self.down_bias))))
        s = F.linear(h[0], *ladders[0])
        for n, i in enumerate(self.kept):
            if self.mix_after:
                s = self._step(n, s, *trace.calls[i])
            s = gates[n] * s + (1 - gates[n]) * F.linear(h[i + 1], *ladders[n + 1])
            if not self.mix_after:
                s = self._step(n, s, *trace.calls[i])
        with thin.cast_to(self.norm, s):
            y = F.linear(self.drop(self.norm(s)), *self.cast(s, self.up, self.up_bias))
        if self.merge_last:
            y = gates[-1] * y + (1 - gates[-1]) * trunk.hidden(trace.output)
        return trunk.replaced(module, trace.output, y)

    def _step(self, n: int, s: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Side block ``n`` under the masks and positions of the trunk's block."""
        if self.turned:
            angles = kwargs["position_embeddings"]
            kwargs = kwargs | {"position_embeddings": tuple(a.index_select(-1, self.turn[n]) for a in angles)}
        return trunk.hidden(self.side[n](s, *args, **kwargs))

    def parameter_count(self) -> int:
        """Σ |θ|/r^{dim θ} over the kept blocks' tensors, (K + 1)(d + 1)d/r ladders, (d/r + 1)d for U, gates, norm."""
        d, s = self.width
        blocks = architecture.blocks(self.site.module)
        side = sum(thin.thin_count(blocks[i][1], self.reduction) for i in self.kept)
        last = thin.last_norm(self.site.module)
        norm = 0 if last is None else thin.thin_count(last, self.reduction)
        return side + (len(self.kept) + 1) * (d + 1) * s + (s + 1) * d + len(self.alpha) + norm


@method("lst-fisher", axis="init", paper="arXiv:2206.06522", system=126, defaults="lst")
class LSTFisher(Init):
    """LST's side blocks start from what the Fisher information of the base's weights lets survive.

    F = mean over the calibration batches of (∂loss/∂W)², as the importance in LST's structural pruning. The paper takes
    1,024 examples in batches of one. It costs one backward pass through the base, and F (out, in) of each layer.
    """

    layers, encoder_decoder = LST.layers, False
    starts_at_base, folds, reasons = LST.starts_at_base, LST.folds, LST.reasons

    def start(self, site: Site, slots: list[Slot], evidence: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Nothing yet: the blocks are pruned once all stands."""
        return {}

    def settle(self, adapter: Adapter, batches: Iterable[Any]) -> None:
        """Gather F with the adapter off and prune by it."""
        sides = [d for d in adapter.deltas.values() if isinstance(d, LST)]
        if not sides:
            raise UserError("lst-fisher starts the side network of lst: lst+lst-fisher")
        sites = all_sites(sides[0].site.module)
        with adapter.disabled():
            found = gather(adapter.model, sites, batches, frozenset({"weight_gradient_square"}))

        def fisher(site: Site) -> Tensor:
            square = found[site].gradient_square
            return site.weight().float().abs() if square is None else square  # no gradient reaches a patch embedding

        sides[0].prune(fisher)


def _bound(fan_in: int) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """The start U(±1/√fan_in)."""
    return lambda shape, g: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=g)


def _last(value: float) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """The start 0, and ``value`` at the end."""
    return lambda shape, g: torch.zeros(shape).index_fill(0, torch.tensor(shape[0] - 1), value)
