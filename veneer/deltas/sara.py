"""SaRA: train the weights that are so small that the model hardly uses them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Base
from veneer.core.delta import Delta, LoRAForm, Slot
from veneer.core.hook import Optim, Schedule
from veneer.core.registry import method
from veneer.core.site import Site
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics.chance import generator
from veneer.numerics.solve import gram_root

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

SAMPLE = 2**22  # entries that a quantile is taken of, at most
FEWEST = 100  # a matrix with no more selected entries than this is not drawn for the nuclear norm


@method(
    "sara",
    axis="delta",
    paper="arXiv:2409.06633",
    system=22,
    gives=("linear", "foldable", "frozen-base"),
    defaults="sara-progress",
)
class SaRA(Delta):
    """The entries of W below a threshold train, and nothing else (Hu et al. 2024).

    M = [|W| < t], W′ = W but for W′[M] = w: y = xW′ᵀ + b. At the start w = W[M], which is the base bit for bit.

    =========  ===========  =========  =====================================
    tensor     shape        trained    start
    =========  ===========  =========  =====================================
    w          (|M|,)       yes        W[M]
    indices    (|M|,) int   no         M in the flat (out, in) view, ascending
    limit      ()           no         t
    =========  ===========  =========  =====================================

    Defaults: t is the quantile of all selected layers' |W| that leaves ``share`` = 10 % below it (the paper finds 10 to
    20 % of a diffusion model's weights idle); the published runs give t = 2e-3 itself for Stable Diffusion 1.5, and the
    rate follows it, see ``official_rate``. One t selects most where weights are small; ``scope="tensor"`` takes the
    quantile of each layer. A layer in which nothing lies below t trains its smallest entry.

    Weight decay acts on w, that is on the values and not on their change. The file holds w and the indices: the
    official one holds w and t, from which another rounding of W finds other entries. The published memory-lean
    optimiser starts from |w| and cannot load what it saves; neither is imitated. It selects among norms and biases too,
    where each bias of 0 is always trained; here those train by ``train=`` alone.

    W is not written: a linear layer makes W′ for the product in forward and again in backward and keeps neither; over
    other adapters, and at other layers, the change w − W[M] is applied as a matrix beside what lies beneath.
    """

    threshold: Annotated[float | None, At(gt=0, doc="t, absolute; by share when None")] = None
    share: Annotated[float, At(gt=0, le=1, doc="share of the weights that lies below t")] = 0.1
    scope: Annotated[Literal["global", "tensor"], At(doc="what the share is counted over: all layers or each")] = (
        "global"
    )

    reasons = {"as_lora": "single entries anywhere in W have full rank together"}

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> Limit | None:
        """The threshold that all layers share."""
        given = fields["threshold"]
        if given is None and fields["scope"] == "tensor":
            return None
        weights = [s.weight() for s in sites]
        if given is not None and not any(bool((W.abs() < given).any()) for W in weights):
            least = min(float(W.abs().min()) for W in weights)
            raise UserError(f"sara: no selected weight is below threshold={given:g}; the smallest is {least:.3g}")
        return Limit(torch.tensor(given) if given is not None else quantile(weights, fields["share"]))

    def slots(self) -> Iterable[Slot]:
        if "indices" not in self._buffers:
            self._select()
        yield Slot("w", "sparse", tuple(self.indices.shape), lambda *_: self._entries(self.site.weight()))

    def _select(self) -> None:
        W = self.site.weight().detach()
        limit = quantile([W], self.share) if self.pool is None else self.pool.threshold
        sizes = W.float().abs().flatten()
        chosen = (sizes < limit.to(sizes.device)).nonzero().flatten()
        chosen = chosen if len(chosen) else sizes.argmin().view(1)
        self.register_buffer("limit", limit.detach().clone().to(self.site_device()))
        self.register_buffer("indices", chosen.to(torch.int32 if W.numel() < 2**31 else torch.int64))

    def build(self) -> None:
        self.usual_rate = official_rate(self.threshold) if self.threshold and self.threshold <= 1e-2 else None

    def _entries(self, W: Tensor) -> Tensor:
        """The selected entries of W (out, in), in fp32."""
        at = self.indices.long()
        return W.detach()[at // W.shape[1], at % W.shape[1]].float()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        source = base.source() if base.fusable and not base.links else None
        given, stored = (source, None) if isinstance(source, Tensor) else (None, source)
        if source is None or (given is not None and given.requires_grad):
            return base.plus(x, self.update(x))
        return _Entries.apply(x, given, stored, base.own_bias(), self.w, self.indices, self.compute_dtype(x))

    def update(self, x: Tensor) -> Tensor:
        return self.site.run(x, *self.cast(x, self.weight()))

    def weight(self, W: Tensor | None = None) -> Tensor:
        site = self.site
        change = self.w - self._entries(site.weight())
        flat = change.new_zeros(site.out_features * site.in_features).index_add(0, self.indices, change)
        return flat.view(site.out_features, site.in_features)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Exactly w where W is the base's own."""
        home, here = self._entries(self.site.weight()), self._entries(W)
        values = torch.where(here == home, self.w, here + (self.w - home))
        folded = W.clone(memory_format=torch.contiguous_format)
        folded.view(-1)[self.indices.long()] = values.to(folded.dtype)
        return folded, b

    def selected(self) -> Tensor:
        """W∘M (out, in): w at its places, zeros elsewhere."""
        flat = self.w.new_zeros(self.site.out_features * self.site.in_features).index_add(0, self.indices, self.w)
        return flat.view(self.site.out_features, self.site.in_features)

    def as_lora(self, W: Tensor, b: Tensor | None) -> LoRAForm | None:
        return None

    def parameter_count(self) -> int:
        """|M|, the number of entries below the threshold."""
        return len(self.indices)


class Limit(nn.Module):
    """The threshold of all layers, 0-dim; each keeps a copy, which is the one that is saved."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.threshold = value.float()


def quantile(weights: list[Tensor], share: float) -> Tensor:
    """The t below which ``share`` of the entries of all weights lies by size, 0-dim fp32; infinite for a share of 1.

    Of more than four million entries evenly spaced ones stand for all.
    """
    stride = -(-sum(W.numel() for W in weights) // SAMPLE)
    sizes = torch.cat([W.detach().flatten()[::stride].abs().float().cpu() for W in weights])
    below = max(1, round(share * len(sizes)))
    return torch.tensor(math.inf) if below >= len(sizes) else sizes.kthvalue(below + 1).values


def official_rate(threshold: float) -> float:
    """The published rate for a threshold: 1e-3·exp(−350·t)."""
    return 1e-3 * math.exp(-350 * threshold)


class _Entries(torch.autograd.Function):
    """``xW′ᵀ + b`` with W′ = W but for w at the indices; made in forward and again in backward, not kept."""

    @staticmethod
    def forward(ctx, x, W, stored, b, w, indices, dtype):
        ctx.save_for_backward(x, W, w, indices)
        ctx.facts = stored, dtype
        M = _put(stored() if W is None else W, w, indices, dtype)
        return F.linear(x.to(dtype), M, None if b is None else b.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, w, indices = ctx.saved_tensors
        stored, dtype = ctx.facts
        need = ctx.needs_input_grad
        grad_x = grad_b = None
        if need[0]:
            grad_x = (grad @ _put(stored() if W is None else W, w, indices, dtype)).to(x.dtype)
        g = grad.reshape(-1, grad.shape[-1])
        if need[3]:
            grad_b = g.sum(0, dtype=torch.float32)
        G = g.T @ x.reshape(-1, x.shape[-1]).to(dtype)
        return grad_x, None, None, grad_b, G.view(-1).index_select(0, indices).to(w.dtype), None, None


def _put(W: Tensor, w: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of W (out, in) in ``dtype`` with w at the flat indices."""
    M = W.detach().to(dtype, copy=True).contiguous()
    M.view(-1).index_copy_(0, indices.long(), w.to(dtype))
    return M


@method("sara-progress", axis="optim", paper="arXiv:2409.06633", system=22, defaults="sara")
class SaRAProgress(Optim):
    """Keep SaRA's entries low-rank, and half-way through go on with those that are still small (Hu et al. 2024).

    Each step one matrix P = W∘M, with both sides above ``smallest`` and more than 100 selected entries, is drawn, and
    λ·UVᵀ of its SVD is added to the gradient at M: the subgradient of λ‖P‖_*. After ``at`` of the run only the entries
    that still lie below t train; the others keep the values they reached, bit for bit.

    Defaults: λ = 5e-4 and ``at`` = 0.5 from the published runs (2500 of 5005 steps), where both are off unless asked
    for. UVᵀ is taken by the Gram matrix of the smaller side in fp64, an eigenvalue problem a step; ``every`` spares
    steps. The penalty is on the weights and not on their change: it draws idle weights to zero from the first step on.
    In the published memory-lean optimiser it has no effect, and the new selection costs a step and all moments; here
    moments stay, as in its reference version. Convolutions have no such term, as there.
    """

    nuclear: Annotated[float, At(ge=0, doc="λ, weight of the nuclear norm")] = 5e-4
    every: Annotated[int, At(ge=1, doc="steps from one nuclear term to the next")] = 1
    smallest: Annotated[int, At(ge=0, doc="matrices with a side up to this have no nuclear term")] = 64
    at: Annotated[float | None, At(ge=0, le=1, doc="share of the run before the new selection; None: never")] = 0.5

    def on_attach(self, adapter: Adapter) -> None:
        if not self.sites():
            raise UserError(f"sara-progress is for the form sara, which {adapter.recipe} does not hold")
        self.when: int | None = None
        self.frozen: dict[int, Tensor] = {}  # by place in sites(): what has stopped, and where it stands
        self.held: dict[int, Tensor] = {}

    def sites(self) -> list[SaRA]:
        """The deltas it acts on."""
        return [d for d in self.adapter.members() if isinstance(d, SaRA)]

    def on_start(self, adapter: Adapter, schedule: Schedule) -> None:
        self.when = None if self.at is None else round(self.at * schedule.steps)

    def before_step(self, step: int) -> None:
        if step == self.when:
            self._stop({i: d.w.detach().abs() >= d.limit for i, d in enumerate(self.sites())})

    def _stop(self, frozen: dict[int, Tensor]) -> None:
        """Hold these entries at the values they have."""
        sites = self.sites()
        self.frozen = frozen
        self.held = {i: sites[i].w.detach()[mask].clone() for i, mask in frozen.items()}

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if self.nuclear and step % self.every == 0:
            self._add_nuclear(step)
        sites = self.sites()
        for i, mask in self.frozen.items():
            if sites[i].w.grad is not None:
                sites[i].w.grad.masked_fill_(mask, 0)

    def _add_nuclear(self, step: int) -> None:
        large = [d for d in self.sites() if d.site.kind != "conv" and len(d.indices) > FEWEST]
        large = [d for d in large if min(d.site.out_features, d.site.in_features) > self.smallest]
        if large:
            draw = generator(self.seed, "sara matrix", step)
            d = large[int(torch.randint(len(large), (), generator=draw))]
            if d.w.grad is not None:
                d.w.grad.add_(nuclear_subgradient(d.selected()).flatten()[d.indices.long()], alpha=self.nuclear)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        sites = self.sites()
        for i, values in self.held.items():
            sites[i].w[self.frozen[i]] = values

    def state_dict(self) -> dict[str, Any]:
        return {"frozen": {str(i): mask for i, mask in self.frozen.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stop({int(i): mask for i, mask in state.get("frozen", {}).items()})


def nuclear_subgradient(P: Tensor) -> Tensor:
    """UVᵀ of P = UΣVᵀ (out, in), null directions left out: the slope of Σσ."""
    wide = P.double()
    if P.shape[0] <= P.shape[1]:
        return (gram_root(wide @ wide.T, -0.5) @ wide).to(P.dtype)
    return (wide @ gram_root(wide.T @ wide, -0.5)).to(P.dtype)
