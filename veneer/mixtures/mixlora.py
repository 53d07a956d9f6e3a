"""MixLoRA: experts that share a frozen MLP, each with its own low-rank change, chosen token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapted import Base, beneath
from veneer.core.context import Context, current
from veneer.core.delta import Delta
from veneer.core.registry import method
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.parts.router import Router
from veneer.parts.trunk import standing_in

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


def balance_loss(counts: Tensor, mass: Tensor, tokens: Tensor) -> Tensor:
    """E·Σₑ fₑPₑ with f = counts/tokens, how often each expert was chosen, and P = mass/tokens, its mean probability.

    ``counts`` and ``mass`` are (E,), ``tokens`` a number. Even use gives the number of experts per token, k.
    The gradient flows through P alone.
    """
    n = tokens.clamp_min(1)
    return len(counts) * (counts / n).detach() @ (mass / n)


class Gate(Router):
    """Logits of the experts, x Rᵀ with R (E, d) ~ N(0, std²), in fp32."""

    def __init__(self, width: int, experts: int, std: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width).normal_(0.0, std, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight)


class Known(Base):
    """An inner layer with its product for one input at hand: the experts share it."""

    fusable = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.known[1] if x is self.known[0] else self.runner(x)


@method(
    "mixlora",
    axis="mixture",
    paper="arXiv:2404.15159",
    system=87,
    wants=("linear", "frozen-base"),
    defaults="lora",
)
class MixLoRA(Delta):
    """A sparse mixture of E experts in each MLP: the frozen MLP, with a change of its layers for each expert (Li 2024).

    p = softmax(xRᵀ), T the top k of p, w = p/Σ_T p, MLP'(x) = Σ_{e∈T} wₑ·Fₑ(x), where Fₑ is the MLP with the recipe's
    form on its layers: Fₑ(x) = down_e(act(gate_e(x)) ∘ up_e(x)). With LoRA that is MixLoRA, with DoRA MixDoRA.

    ===============  ==============================  =========  ==============================
    tensor           shape                           trained    start
    ===============  ==============================  =========  ==============================
    router.weight R  (E, d), fp32 always             yes        N(0, 0.02²), of switch N(0, 1)
    expert           the form's own, at each of      yes        the form's own
                     gate, up, down, E times
    ===============  ==============================  =========  ==============================

    Taken are MLPs that are one module of their block (Llama, GPT-2, T5 …) with a selected layer, and of their layers
    the selected; BERT's and BART's, whose layers lie apart, are not. Other selected sites get the form as it is.

    The frozen products of layers that read x are made once a token, whatever k; those behind the activation once per
    chosen expert. Auxiliary loss: c·E·Σₑ fₑPₑ, with f and P over the tokens of all layers (or averaged by layer).
    ``dynamic`` keeps the fewest experts whose p sum to over p₀, and does not renew their p: it starts off the base.
    ``switch`` takes one expert times its p, starts off the base too, and adds 0.001·mean(logsumexp²).

    Defaults are the official code's: E = 8, k = 2, p₀ = 0.8, capacity 32, but c = 0.01 is its README's (code: 0.001);
    its template has rank 16, α 32 and dropout 0.05. Otherwise than there: noise on x in training only; switch returns
    the expert's output at inference too, and tokens over capacity (in training, by expert and row) pass the frozen MLP.
    """

    axis = "mixture"
    layers = ("module",)
    folds = False
    reasons = {"folds": "the experts, and so the weights, change from token to token"}

    experts: Annotated[int, At(ge=1, doc="E, experts of each MLP")] = 8
    top_k: Annotated[int, At(ge=1, doc="k, experts of a token")] = 2
    routing: Annotated[Literal["top-k", "dynamic", "switch"], At(doc="how a token's experts are chosen")] = "top-k"
    top_p: Annotated[float, At(gt=0, le=1, doc="p₀ of dynamic routing")] = 0.8
    balance: Annotated[float, At(ge=0, doc="c, on the balance loss")] = 0.01
    pooled: Annotated[bool, At(doc="balance over all layers together, not each for itself")] = True
    jitter: Annotated[float | None, At(ge=0, lt=1, doc="x times U(1±jitter); 0, of switch 0.01, when None")] = None
    capacity: Annotated[int, At(ge=1, doc="tokens of a row that an expert of switch takes in training")] = 32
    z_loss: Annotated[float, At(ge=0, doc="on the squared logsumexp of switch's logits")] = 0.001

    @classmethod
    def takes(cls, site: Site) -> bool:
        """The MLPs."""
        return site.kind == "module"

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The MLPs with a selected layer, in place of their layers, and the other selected sites."""
        selected = {s.module for s in sites}
        inner: set[nn.Module] = set()
        found = []
        for part in architecture.mlp_modules(model):
            layers = {layer.module: role for role, layer in part.layers.items() if layer.module in selected}
            if layers:
                found.append(module_site(model, part.path, {role: layer for layer, role in layers.items()}))
                inner |= layers.keys()
        if not found:
            raise UserError(
                f"mixlora takes MLPs that are modules of their own, and {type(model).__name__} has none among the "
                "selected sites (BERT and BART keep the two layers of theirs apart): select others, or take lora"
            )
        return found + [s for s in sites if s.module not in inner]

    def build(self) -> None:
        if self.top_k > self.experts:
            raise UserError(f"mixlora: top_k={self.top_k} is more than there are experts ({self.experts})")
        reads = [s.in_features for role, s in self.site.parts.items() if role != "down"]
        width = reads[0] if reads else self.site.parts["down"].out_features
        std = 1.0 if self.routing == "switch" else 0.02
        self.router = Gate(width, self.experts, std, self.generator("gate")).to(self.site_device())

    def compose(self, make: Callable[..., Delta], adapter: Adapter) -> None:
        """Build the experts: the recipe's form at every selected layer, E times."""
        form = adapter.recipe.part("delta").method.cls
        if "linear" not in form.layers or form.places.__func__ is not Delta.places.__func__:
            raise UserError(f"mixlora makes experts of a form that runs at linear layers, which {form.name} does not")
        self.expert = nn.ModuleDict()
        for role, site in self.site.parts.items():
            self.expert[role] = nn.ModuleList(make(e, site) for e in range(self.experts))
        mine = [s.index for s in adapter.sites if s.kind == "module"]
        self.count, self.last = len(mine), self.site.index == mine[-1]

    def members(self) -> Iterable[Delta]:
        """The experts' deltas."""
        return (delta for bank in self.expert.values() for delta in bank)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        jitter = (0.01 if self.routing == "switch" else 0.0) if self.jitter is None else self.jitter
        if self.training and jitter:
            g = torch.Generator().manual_seed(self.draw_seed())
            noise = torch.empty(tokens.shape).uniform_(1 - jitter, 1 + jitter, generator=g)
            tokens = tokens * noise.to(tokens)
        logits = self.router(tokens)
        p = logits.softmax(-1)
        token, expert, weight = self.route(p)
        self.note(logits, p, token, expert, x)
        if self.routing == "switch" and self.training:
            expert = self.within_capacity(expert, x.shape)
        y = self.mixed(tokens, token, expert, weight, base)
        return y.view(*x.shape[:-1], y.shape[-1])

    def route(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From p (N, E) the choices (M,) in order of tokens: the token, its expert, and the expert's weight."""
        if self.routing == "dynamic":
            ranked, order = p.sort(dim=-1, descending=True, stable=True)
            kept = ranked.cumsum(-1) - ranked <= self.top_p
            return kept.nonzero()[:, 0], order[kept], ranked[kept]
        k = 1 if self.routing == "switch" else self.top_k
        w, chosen = p.topk(k, dim=-1)
        w = w if self.routing == "switch" else w / w.sum(-1, keepdim=True)
        return torch.arange(len(p), device=p.device).repeat_interleave(k), chosen.flatten(), w.flatten()

    def within_capacity(self, expert: Tensor, shape: torch.Size) -> Tensor:
        """The choices (N,) of a row beyond an expert's capacity as E: no expert."""
        taken = F.one_hot(expert, self.experts).view(-1, shape[-2] if len(shape) > 2 else len(expert), self.experts)
        place = taken.cumsum(1).view(-1, self.experts).gather(1, expert[:, None])[:, 0]
        return expert.masked_fill(place > self.capacity, self.experts)

    def mixed(self, tokens: Tensor, token: Tensor, expert: Tensor, weight: Tensor, base: Base) -> Tensor:
        """Σ w·Fₑ(x) over the choices (M,): (N, d). The choices are sorted by expert.

        Plain pairs run all together, each row on its part of the stacked factors; other forms expert by expert.
        """
        order = expert.argsort(stable=True)
        rows, of = token[order], expert[order]
        together = all(d.is_plain() and d.offset is None and d.product is d.default_product for d in self.members())
        sizes = [len(rows)] if together else torch.bincount(expert, minlength=self.experts + 1).tolist()
        inputs = tokens.index_select(0, rows).split(sizes)
        shared: dict[str, tuple[Tensor, ...]] = {}
        now = 0

        def layer(own: Callable[[Tensor], Tensor], name: str, role: str | None, z: Tensor) -> Tensor:
            if z is not inputs[now]:
                y = own(z)
            else:
                if name not in shared:
                    shared[name] = own(tokens).index_select(0, rows).split(sizes)
                y = shared[name][now]
            if role is None or now == self.experts:
                return y
            return stacked(self.expert[role], of, z, y) if together else changed(self.expert[role][now], own, z, y)

        outputs = []
        with standing_in(self.inner(layer)):
            for now, part in enumerate(inputs):
                # An expert without a token runs on no rows where its gradient is wanted, so that it is zero, not None.
                if len(part) or (now < self.experts and torch.is_grad_enabled()):
                    outputs.append(base(part))
        y = torch.cat(outputs)
        y = y * weight[order, None].to(y.dtype)
        return y.new_zeros(len(tokens), y.shape[-1]).index_add(0, rows, y)

    def inner(self, layer: Callable[..., Tensor]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """A stand-in for the forward of each linear layer of the MLP."""
        roles = {s.module: role for role, s in self.site.parts.items()}
        linear = [(n, m) for n, m in architecture.named_modules(self.site.module) if architecture.features(m)]
        return {m: partial(layer, m.forward, n, roles.get(m)) for n, m in linear}

    def note(self, logits: Tensor, p: Tensor, token: Tensor, expert: Tensor, x: Tensor) -> None:
        """Leave the use of the experts and the auxiliary losses in the pass's context."""
        ctx = current()
        if ctx is None:
            return
        counted = self.counted(ctx, x)
        counts = torch.zeros(self.experts, device=p.device).index_add(0, expert, counted[token])
        found = torch.stack([counts, (p * counted[:, None]).sum(0)])
        numbers = torch.stack([counted.sum(), (logits.logsumexp(-1).square() * counted).sum()])
        ctx.add_stat("mixlora", (self.site.path, counts))
        # Recomputation must make the same tensors again: the last MLP reads the records of the others and its own.
        records = ctx.kept.setdefault(("mixlora", self.adapter_name), {})
        if not ctx.closed:
            records[self.site.index] = (found, numbers)
        if not self.pooled:
            self.add_losses(ctx, found, numbers, 1 / self.count)
        elif self.last:
            every = [r for index, r in records.items() if index != self.site.index] + [(found, numbers)]
            self.add_losses(ctx, *(torch.stack(r).sum(0) for r in zip(*every)), 1.0)

    def add_losses(self, ctx: Context, found: Tensor, numbers: Tensor, share: float) -> None:
        """Append the balance loss and, of switch, the loss on the size of the logits."""
        if self.balance:
            ctx.add_loss("balance", share * self.balance * balance_loss(*found, numbers[0].detach()))
        if self.routing == "switch" and self.z_loss:
            ctx.add_loss("router-z", share * self.z_loss * numbers[1] / numbers[0].clamp_min(1))

    def counted(self, ctx: Context, x: Tensor) -> Tensor:
        """Which tokens (N,) are no padding, as ones and zeros."""
        mask = ctx.mask
        model, _, _, kwargs = ctx.call or (None, None, (), {})
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder" in self.site.path:
            mask = kwargs.get("decoder_attention_mask")
        if mask is None or x.ndim != 3 or mask.shape != x.shape[:2]:
            return torch.ones(x[..., 0].numel(), device=x.device)
        return mask.reshape(-1).float()

    def parameter_count(self) -> int:
        """E·d of the router, and E times the form's own at each layer: 3·E·r·(d + f) for LoRA on all three."""
        return self.router.weight.numel() + sum(delta.parameter_count() for delta in self.members())


def changed(delta: Delta, own: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``y``, the layer's own output for ``x``, as one expert's delta changes it."""
    below = beneath(delta.site)
    base = Known(delta.site, own, below.links, (x, y))
    for link in delta.under():
        y = link.run(x, base)
        base = Known(delta.site, partial(link.run, base=base), (*base.links, link), (x, y))
    return y


def stacked(bank: nn.ModuleList, of: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``y`` (M, out) with the change of expert ``of`` (M,) on each row; E, no expert, changes nothing."""
    pairs = [delta.pair() for delta in bank]
    ranks = torch.tensor([len(p.A) for p in pairs])
    owner = torch.arange(len(bank)).repeat_interleave(ranks).to(of.device)
    A, B = bank[0].cast(x, torch.cat([p.A for p in pairs]), torch.cat([p.scale * p.B for p in pairs], dim=1))
    h = F.linear(bank[0].drop(x), A) * (of[:, None] == owner)
    return torch.addmm(y, h, B.T)
