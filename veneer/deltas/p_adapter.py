"""p-Adapter: a gated bottleneck on each attention's output that weighs the attention graph's edges anew."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.registry import method
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance
from veneer.parts.attention_map import Attention, watched

OTHERS = ("encoder_hidden_states", "key_value_states")  # what a cross-attention is given besides
EPSILON = 1e-8
FLOOR = 1e-3  # of the mean distance


def calibrated(
    mine: Tensor,
    nodes: Tensor,
    S: Tensor,
    p: Tensor | float,
    mu: Tensor | float,
    own: int | None = None,
    published: bool = False,
    teleport: bool = True,
) -> Tensor:
    """One step of p-Laplacian message passing: Fᵢ = αᵢ·Σⱼ Mᵢⱼfⱼ + βᵢ·fᵢ with Mᵢⱼ = Sᵢⱼ·(√Sᵢⱼ·‖fⱼ − fᵢ‖)^(p−2).

    αᵢ = 1/(Σⱼ Mᵢⱼ + 2μ/p) and βᵢ = αᵢ·2μ/p, so the weights of a row sum to one. Edges of weight 0 stay so. No tensor of
    pairs times channels is formed.

    Args:
        mine: fᵢ (…, n, c) of the rows; nodes: fⱼ (…, k, c); S: (…, n, k), not negative.
        p, mu: 0-dim or numbers, over 0.
        own: row i is node i + ``own``, whose edge to itself is left out; None where rows are no nodes, or keep it.
        published: the official code's numbers: ε = 1e-8 under the root and in each channel, and no floor. At an edge of
            length 0 that weighs (ε√c)^(p−2); ours takes a thousandth of the mean length.
        teleport: False leaves βᵢ·fᵢ out, as the official code does in cross-attention.
    """
    # differences first: squared lengths less twice the product would lose the digits of short edges
    lengths = torch.cdist(mine, nodes, compute_mode="donot_use_mm_for_euclid_dist")
    if own is not None:
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(own).tril(own), 0.0)
    if published:
        t = S + EPSILON
        sums = nodes.sum(-1)[..., None, :] - mine.sum(-1)[..., :, None]
        M = S * (t * lengths.square() + 2 * EPSILON * t.sqrt() * sums + mine.shape[-1] * EPSILON**2).pow((p - 2) / 2)
    else:
        floor = FLOOR * lengths.detach().mean((-1, -2), keepdim=True) + EPSILON
        M = S.clamp_min(EPSILON).pow(p / 2) * lengths.maximum(floor).pow(p - 2) * (S > 0)
    weight = 2 * mu / p
    total = M.sum(-1, keepdim=True) + weight
    return (M @ nodes + (weight * mine if teleport else 0.0)) / total


@method("p-adapter", axis="delta", paper="arXiv:2312.10613", system=98, gives=("frozen-base",))
class PAdapter(Delta):
    """A bottleneck after each attention whose features are averaged over the attention graph, nearer or farther first.

    o′ = o + (GELU(oGᵀ + b_G) ∘ F)Uᵀ + b_U with o the attention's output (Wu et al. 2023, §3.3). F is one step of
    p-Laplacian message passing, see ``calibrated``, by head over f = (z·W_oᵀ + b_o)Dᵀ + b_D. In self-attention the z
    are the value vectors and S the attention weights before dropout; in cross-attention the queries get messages from
    the values, both pooled to n_v along the keys. p < 2 trusts near neighbours, p > 2 distant ones, p = 2 averages.

    =========  ==========  =========  =======================  ====================
    tensor     shape       trained    start                    ``start="paper"``
    =========  ==========  =========  =======================  ====================
    D, G       (m, d)      yes        U(−1/√d, 1/√d)           N(0, 0.02²)
    U          (d, m)      yes        0                        N(0, 0.02²)
    b_D, b_G   (m,)        yes        0                        0
    b_U        (d,)        yes        0                        0
    p          ()          yes        1.5; used in [1, 4]      the same
    m          ()          yes        0; μ·(2 + tanh m) is μ   the same
    =========  ==========  =========  =======================  ====================

    m = d/8, taken to a multiple of the heads. Official by task: p = 1.25 (VQA), 1.5 (entailment), 1.75 (captions), μ =
    0.1 or 10, n_v = 16 or 24, rates of 3e-4 to 5e-4; its decay of 0.05 hits p and m as well, better leave it at 0. It
    trains bottlenecks beside the MLPs too, which here are an adapter of their own. The start at the base is ours.

    In the official code each node's edge to itself, of length 0, outweighs all others where p < 2: here it is left out
    and shorter edges count as a thousandth of the mean (``published=True`` gives its numbers). Its matrix β is cut away
    in cross-attention, so that rows weigh less than one; ``teleport=False`` does that. With a key-value cache it
    takes queries for nodes, unlike in training; here the cached values stay the nodes, so decoding equals training.
    The branch joins ahead of the output's dropout. Its backward needs o, the queries, keys and values, and of those
    makes the rest again: no matrix of heads × n × n is kept, and the branch runs forward twice.
    """

    reduction: Annotated[int, At(ge=1, doc="d over the width m")] = 8
    exponent: Annotated[float, At(ge=1, le=4, doc="p at the start")] = 1.5
    learn: Annotated[bool, At(doc="whether p and m train")] = True
    mu: Annotated[float, At(gt=0, doc="μ, the weight of a node's own features; doubled at the start")] = 0.1
    samples: Annotated[int, At(ge=1, doc="n_v, nodes that a cross-attention's keys are pooled to")] = 16
    start: Annotated[Literal["zero", "paper"], At(doc="how D, G and U start")] = "zero"
    published: Annotated[bool, At(doc="edges to oneself, and ε, as in the official code")] = False
    teleport: Annotated[bool, At(doc="a node's own features in cross-attention too")] = True

    layers = ("linear",)
    folds = False
    reasons = {"folds": "the branch is not linear and depends on the attention", "as_lora": "the branch is not linear"}

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The attention modules of the blocks that hold a selected layer."""
        blocks = [f"{path}." for path, _ in architecture.blocks(model) if any(f"{path}." in s.path for s in sites)]
        parts = [p for p in architecture.attention_modules(model) if p.path.startswith(tuple(blocks))]
        if not parts or architecture.heads(model) is None:
            raise UserError(
                "p-adapter stands behind the attention of transformers' blocks; the selected layers lie in none"
            )
        return [module_site(model, p.path, {r: inner.module for r, inner in p.layers.items()}) for p in parts]

    def slots(self) -> Iterable[Slot]:
        d, m = self._sizes()
        first, second = (chance.kaiming_uniform, chance.zeros) if self.start == "zero" else (chance.normal(0.02),) * 2
        for name in "DG":
            yield Slot(name, "factor_a", (m, d), first)
            yield Slot(f"b_{name}", "bias", (m,))
        yield Slot("U", "factor_b", (d, m), second)
        yield Slot("b_U", "bias", (d,))
        yield Slot("p", "diagonal", (), lambda *_: torch.tensor(self.exponent), trained=self.learn)
        yield Slot("m", "diagonal", (), trained=self.learn)

    def build(self) -> None:
        self.starts_at_base = self.start == "zero"

    def forward(self, x: Tensor | None, base: Base, *args: Any, **kwargs: Any) -> Any:
        layers = {role: part.module for role, part in self.site.parts.items()}
        cross = any(kwargs.get(name) is not None for name in OTHERS)
        with watched(self.site.module, layers) as seen:
            handle = layers["o"].register_forward_hook(partial(self._add, seen, cross))
            try:
                return base(x, *args, **kwargs)
            finally:
                handle.remove()

    def _add(self, seen: Attention, cross: bool, layer: nn.Module, args: tuple, o: Tensor) -> Tensor:
        """The attention's output with the branch added."""
        if seen.query is None:
            raise UserError(f"p-adapter: {self.site.path} computes its attention in a way that shows no weights")
        # whatever it computes follows from what the attention and o keep anyway
        return o + checkpoint(self._branch, seen, cross, o, use_reentrant=False, preserve_rng_state=False)

    def _branch(self, seen: Attention, cross: bool, o: Tensor) -> Tensor:
        """(GELU(oGᵀ + b_G) ∘ F)Uᵀ + b_U."""
        heads, rows = seen.query.shape[1], seen.query.shape[2]
        D, b_D, G, b_G, U, b_U = self.cast(o, self.D, self.b_D, self.G, self.b_G, self.U, self.b_U)
        out = self.site.parts["o"]
        W, b = out.weight().to(D.dtype), out.bias()
        to_features = D @ W, b_D if b is None else b_D + D @ b.to(D.dtype)

        def features(z: Tensor) -> Tensor:
            """(batch, heads, n, d_h) to fp32 (batch, heads, n, m/heads)."""
            f = F.linear(z.transpose(1, 2).flatten(2).to(D.dtype), *to_features)
            return f.unflatten(-1, (heads, -1)).transpose(1, 2).float()

        with torch.autocast(o.device.type, enabled=False):
            S, nodes = seen.probabilities(), features(seen.value)
            own = nodes.shape[2] - rows
            if cross:
                mine, own = features(seen.query), None
                S, nodes = pooled(S, nodes, self.samples)
            else:
                mine = nodes[:, :, own:]
                own = None if self.published else own
            p, mu = self.p.clamp(1.0, 4.0), self.mu * (2 + self.m.tanh())
            f = calibrated(mine, nodes, S, p, mu, own, self.published, self.teleport or not cross)
        f = f.transpose(1, 2).flatten(2).to(U.dtype)
        return F.linear(F.gelu(F.linear(o, G, b_G)) * f, U, b_U)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(f"p-adapter cannot fold: {self.reasons['folds']}")

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """3dm + 2m + d, and 2 for p and m."""
        d, m = self._sizes()
        return 3 * d * m + 2 * m + d + (2 if self.learn else 0)

    def _sizes(self) -> tuple[int, int]:
        """(d, width m): d over the reduction, to a multiple of the heads."""
        out = self.site.parts["o"]
        d, heads = out.out_features, out.heads or 1
        return d, max(1, round(d / self.reduction / heads)) * heads


def pooled(S: Tensor, nodes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Keys pooled to ``count`` nodes by averages along them; keys that no row sees are left out of a node's features.

    S (batch, heads, n, k), nodes (batch, heads, k, c); as they are where k is no more than ``count``.
    """
    if S.shape[-1] <= count:
        return S, nodes
    visible = (S.detach() > 0).any(1).any(1).to(nodes.dtype)[:, None, None]  # (batch, 1, 1, k)
    features = F.adaptive_avg_pool1d((nodes.mT * visible).flatten(0, 1), count)
    share = F.adaptive_avg_pool1d(visible.flatten(0, 1), count).repeat_interleave(nodes.shape[1], 0)
    features = (features / share.clamp_min(EPSILON)).unflatten(0, nodes.shape[:2]).mT
    return F.adaptive_avg_pool1d(S.flatten(0, 1), count).unflatten(0, S.shape[:2]), features
