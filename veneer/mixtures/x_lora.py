"""X-LoRA: trained adapters mixed per token and per layer by what the base model makes of the text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, adapters
from veneer.core.context import Context, current
from veneer.core.delta import Delta
from veneer.core.registry import find, method
from veneer.core.site import Site
from veneer.errors import UserError, nearest
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics.chance import generator
from veneer.parts.router import Router, base_pass

if TYPE_CHECKING:
    from veneer.core.adapted import Base


class Classifier(Router):
    """Last hidden state H (…, d) → weights S (…, L, n): Linear, or Linear → ReLU → dropout stacked to ``depth``."""

    def __init__(self, width: int, sites: int, experts: int, fields: dict[str, Any], seed: int) -> None:
        super().__init__()
        self.shape = (sites if fields["layerwise"] else 1, experts)
        self.softmax, self.temperature = fields["softmax"], fields["temperature"]
        self.top_k, self.softmax_top_k = fields["top_k"], fields["softmax_top_k"]
        sizes = [width, *[fields["size"]] * (fields["depth"] - 1), self.shape[0] * experts]
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(fields["dropout"])
        for i, layer in enumerate(self.layers):
            g, bound = generator(seed, "x-lora", i), layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=g)
            nn.init.uniform_(layer.bias, -bound, bound, generator=g)

    def forward(self, H: Tensor) -> Tensor:
        h = H.to(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            h = self.dropout(layer(h).relu())
        Z = self.layers[-1](h).unflatten(-1, self.shape)
        return self.chosen((Z / self.temperature).softmax(-1) if self.softmax else Z)

    def chosen(self, S: Tensor) -> Tensor:
        """S with all but the ``top_k`` largest weights of a token at 0; with ``softmax_top_k`` renewed over those."""
        if self.top_k is None or self.top_k >= S.shape[-1]:
            return S.softmax(-1) if self.softmax_top_k else S
        kept = torch.zeros_like(S, dtype=torch.bool).scatter(-1, S.topk(self.top_k, dim=-1).indices, True)
        if self.softmax_top_k:
            return S.masked_fill(~kept, float("-inf")).softmax(-1)
        return S * kept

    def prepare(self, ctx: Context) -> None:
        """Once a forward: the base's own pass, then the weights of every site."""
        ctx.keep(self, self(base_pass(ctx)))


@method("x-lora", axis="mixture", paper="arXiv:2402.07148", system=33, gives=("frozen-base",))
class XLoRA(Delta):
    """A mixture of frozen adapters, weighted per token and layer (Buehler & Buehler 2024).

    y = base(x) + g·Σₖ S[t, ℓ, k]·Δₖ(x), with S from a classifier on the base model's last hidden state of the same
    input, so that every forward is two passes. S is a softmax over the n adapters of Z/τ, or Z itself.

    ==============  =====================================  =========  ================================
    tensor          shape                                  trained    start
    ==============  =====================================  =========  ================================
    classifier      (m, d) … (n·L, m) with biases          yes        U(±1/√fan_in), torch's default
    experts         the named adapters' own, copied        no         as they were trained
    ==============  =====================================  =========  ================================

    L counts the sites of all experts in module order; an expert without a site there adds nothing. The named adapters
    stay attached and take no part while the mixture is on. Defaults are the official code's: width 2048, dropout 0.2,
    τ = 1, g = 1, softmax, per layer, depth 1 (its example has 8). The softmax over the kept top k is taken token by
    token, as in PEFT: the official code's ran over all tokens at once. Decoding with a key-value cache, which both
    refuse, keeps a second cache for the base pass. A layer whose input has no tokens, or others than the classifier
    saw (a pooler), takes the mean of S over the tokens.
    """

    axis = "mixture"
    layers = ("linear", "embedding")
    standalone = True
    starts_at_base = False
    folds = False
    encoder_decoder = False
    reasons = {
        "starts_at_base": "the experts are trained already, and the mixture weighs them from the first step",
        "folds": "the weights of the experts change from token to token",
        "encoder_decoder": "generation runs the encoder apart, where nothing has routed yet",
    }

    adapters: Annotated[tuple[str, ...], At(doc="names of adapters attached to the model")] = ()
    depth: Annotated[int, At(ge=1, doc="linear layers of the classifier")] = 1
    size: Annotated[int, At(ge=1, doc="width of its hidden layers")] = 2048
    dropout: Annotated[float, At(ge=0, lt=1, doc="between its layers")] = 0.2
    layerwise: Annotated[bool, At(doc="weights of their own for each site")] = True
    softmax: Annotated[bool, At(doc="weights sum to 1")] = True
    temperature: Annotated[float, At(gt=0, doc="τ")] = 1.0
    top_k: Annotated[int | None, At(ge=1, doc="experts kept per token and site")] = None
    softmax_top_k: Annotated[bool, At(doc="renew the weights over the kept ones")] = False
    strength: Annotated[float, At(doc="g, on the whole mixture")] = 1.0
    experts: Annotated[tuple[Any, ...], At(doc="what each expert is here; set by attaching")] = ()

    @classmethod
    def takes(cls, site: Site) -> bool:
        """Every site of the experts."""
        return True

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The union of the experts' sites; of a file, whose experts come with it, those it names."""
        attached = adapters(model)
        if not fields["adapters"]:
            raise UserError("x-lora mixes adapters that are attached: x-lora(adapters=['a', 'b'])")
        if getattr(architecture.text_config(model), "is_encoder_decoder", False):
            raise UserError(f"x-lora does not take encoder–decoder models: {cls.reasons['encoder_decoder']}")
        unknown = [a for a in fields["adapters"] if a not in attached]
        if unknown and len(unknown) < len(fields["adapters"]):
            raise UserError(f"x-lora: the model has no adapter {unknown[0]!r}{nearest(unknown[0], attached)}")
        paths = {p for a in fields["adapters"] if a in attached for p in attached[a].deltas}
        return [s for s in sites if s.path in paths] if paths else [s for s in sites if s.kind in cls.layers]

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module:
        width = architecture.hidden_size(model)
        return Classifier(width, len(sites), len(fields["adapters"]), fields, seed)

    def compose(self, make: Callable[..., Delta], adapter: Adapter) -> None:
        """Copy the experts' deltas at this site, or build those a file describes."""
        attached = adapters(adapter.model)
        if not self.experts:
            missing = [a for a in self.adapters if a not in attached]
            if missing:
                raise UserError(f"x-lora: the model has no adapter {missing[0]!r}; attach or load it first")
            found = [attached[a].deltas.get(self.site.path) for a in self.adapters]
            self.experts = tuple(None if d is None else {"form": d.name, "fields": d.field_values()} for d in found)
        else:
            found = [None] * len(self.experts)
        self.mixed = nn.ModuleDict()
        for k, (said, source) in enumerate(zip(self.experts, found)):
            if said is None:
                continue
            expert = find(said["form"]).cls(self.site, seed=self.seed, adapter=self.adapter_name, **said["fields"])
            if expert.pair() is None or (source is not None and source.offset is not None):
                raise UserError(f"x-lora mixes plain low-rank adapters; {said['form']} at {self.site.path} is not one")
            if source is not None:
                pair = source.pair()
                expert.set_tensor("A", pair.A)
                expert.set_tensor("B", pair.B)
                expert.scale = source.scale
            expert.register_buffer("s", torch.tensor(expert.scale))
            expert.rebuilt.clear()
            self.mixed[str(k)] = expert.requires_grad_(False)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base.without(self.adapters)(x)
        S = self.strength * current().kept[self.pool][..., self.site.index if self.layerwise else 0, :]
        for k, expert in self.mixed.items():
            A, B = self.cast(x, expert.A, expert.B)
            h = self.site.project(x, A)
            if S.shape[:-1] != h.shape[:-1]:
                S = S.mean(tuple(range(1, S.ndim - 1))).view(len(S), *(1 for _ in h.shape[2:]), -1)
            y = y + self.site.lift(h * (S[..., int(k), None] * expert.s).to(h.dtype), B)
        return y

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(f"x-lora cannot fold: {self.reasons['folds']}")

    def parameter_count(self) -> int:
        """(d+1)·n·L at depth 1, (d+1)m + (D−2)(m+1)m + (m+1)·n·L deeper; counted once, at the first site."""
        if self.site.index:
            return 0
        classifier = self.pool
        d, outputs = classifier.layers[0].in_features, classifier.shape[0] * classifier.shape[1]
        if self.depth == 1:
            return (d + 1) * outputs
        m = self.size
        return (d + 1) * m + (self.depth - 2) * (m + 1) * m + (m + 1) * outputs
