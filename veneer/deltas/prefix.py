"""Prefix tuning: trained keys and values that every token of a layer attends to."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.adapted import Base
from veneer.core.context import Context, current
from veneer.core.delta import Delta, Slot
from veneer.core.registry import PeftMap, method
from veneer.core.site import Site, module_site
from veneer.errors import UserError
from veneer.fields import At
from veneer.models import architecture
from veneer.numerics import chance


@method("prefix", axis="delta", paper="arXiv:2101.00190", system=0, gives=("frozen-base",))
class Prefix(Delta):
    """n trained keys and values ahead of each attention's own.

    o = softmax(q·[K_p; K]ᵀ/√d_h)·[V_p; V], the mask open on the prefix (Li & Liang 2021, §4.2). Queries have no prefix.

    ======  ============  =========  ===========================================
    tensor  shape         trained    start
    ======  ============  =========  ===========================================
    K       (n, d_kv)     yes        N(0, std²)
    V       (n, d_kv)     yes        N(0, std²)
    ======  ============  =========  ===========================================

    d_kv is key–value heads times head width; keys are taken as they are, without rotary embedding. With ``projection``
    (the paper's way) there are E (n, d_kv) and an MLP for all layers together, [K, V] = tanh(EW₁ᵀ + b₁)W₂ᵀ + b₂ with W₁
    (h, d_kv) and W₂ (2L·d_kv, h), computed once a forward. Defaults: n = 20, std = 0.02; the paper has n = 10 to 200,
    rates 5e-5 to 1e-2. PEFT's start N(0, 1) costs more at first; its zeros would keep all n alike without projection.

    Positions of the tokens move up by n, as in the paper and in PEFT; ``shift=False`` leaves them. The prefix is put in
    where attention updates its cache, so that it works without a cache too, under gradient checkpointing, where PEFT's
    is lost, and beside a cache that generation owns. Attention must be transformers' ``sdpa`` or ``eager``. Backward
    keeps the lengthened keys and values.
    """

    length: Annotated[int, At(ge=1, doc="n, keys and values a layer")] = 20
    std: Annotated[float, At(ge=0, doc="standard deviation of the start")] = 0.02
    shift: Annotated[bool, At(doc="positions of the tokens begin after the prefix")] = True
    projection: Annotated[bool, At(doc="an MLP over a small embedding gives all K and V")] = False
    hidden: Annotated[int | None, At(ge=1, doc="width h of that MLP; d_kv when None")] = None

    layers = ("module",)
    starts_at_base = False
    folds = False
    encoder_decoder = False
    reasons = {
        "starts_at_base": "every key takes a share of the attention",
        "folds": "further keys and values are no change of a weight",
        "encoder_decoder": "relative positions and cross-attention would have to count the prefix",
    }
    peft = PeftMap(
        "PREFIX_TUNING",
        fields={"length": "num_virtual_tokens", "projection": "prefix_projection", "hidden": "encoder_hidden_size"},
        keys={"K": "prompt_embeddings", "V": "prompt_embeddings"},  # (n, 2L·d_kv): K, V of layer 0, K, V of layer 1 …
    )

    @classmethod
    def places(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any]) -> list[Site]:
        """The attention of every block that holds a selected layer, and the trunk, where positions are given."""
        config, heads, width = (
            architecture.text_config(model),
            architecture.heads(model, "k"),
            architecture.head_dim(model),
        )
        blocks = [path for path, _ in architecture.blocks(model) if any(s.path.startswith(f"{path}.") for s in sites)]
        parts = [p for p in architecture.attention_modules(model) if any(p.path.startswith(f"{b}.") for b in blocks)]
        parts = [p for p in parts if {"past_key_values", "attention_mask"} <= set(_names(p.module))]
        if not parts or not heads or not width or getattr(config, "is_encoder_decoder", False):
            raise UserError(
                "prefix wants transformers blocks whose attention takes a key–value cache, and finds none among those "
                f"of the selected layers in {type(model).__name__} (encoder–decoders are not supported)"
            )
        if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
            raise UserError(
                f"prefix works with attn_implementation 'sdpa' or 'eager', not {config._attn_implementation!r}; "
                "call model.set_attn_implementation('sdpa')"
            )
        found = [module_site(model, p.path) for p in parts]
        for site in found:
            site.heads, site.out_features, site.in_features = heads, heads * width, architecture.hidden_size(model)
        inner = architecture.trunk(model)
        path = next(n for n, m in model.named_modules() if m is inner)
        if fields["shift"] and ("position_ids" not in _names(inner) or not path):
            raise UserError(f"prefix: {type(inner).__name__} takes no positions to move; shift=False leaves them alone")
        return found + ([module_site(model, path)] if fields["shift"] else [])

    @classmethod
    def shared(cls, model: nn.Module, sites: list[Site], fields: dict[str, Any], seed: int) -> nn.Module | None:
        if not fields["projection"]:
            return None
        own = [s for s in sites if s.heads and s.out_features]
        width = own[0].out_features
        device = next(model.parameters()).device
        return Projection(len(own), fields["length"], width, fields["hidden"] or width, seed).to(device)

    @property
    def at_attention(self) -> bool:
        """Whether this is the place of keys and values, and not the trunk's."""
        return self.site.out_features > 0

    def slots(self) -> Iterable[Slot]:
        for name in ("K", "V") if self.at_attention and not self.projection else ():
            yield Slot(name, "core", (self.length, self.site.out_features), chance.normal(self.std))

    def forward(self, x: Any, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = kwargs if x is None else dict(zip(_names(self.site.module), (x, *args))) | kwargs
        change = self._with_prefix if self.at_attention else self._moved
        return base(None, **(call | change(call)))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise UserError(f"prefix cannot fold: {self.reasons['folds']}")

    def parameter_count(self) -> int:
        """2n·d_kv a layer; with projection n·d_kv + (d_kv + 1)·h + (h + 1)·2L·d_kv, counted at the first."""
        n, d = self.length, self.site.out_features
        if not self.projection:
            return 2 * n * d
        if self.site.index or not self.at_attention:
            return 0
        h = self.hidden or d
        return n * d + (d + 1) * h + (h + 1) * len(self.pool.b2)

    def _with_prefix(self, call: dict[str, Any]) -> dict[str, Any]:
        """What an attention's call becomes: a cache that puts the prefix first, a mask that is open on it."""
        K, V = current().kept[self.pool][self.site.index] if self.projection else (self.K, self.V)
        K, V = (t.view(1, self.length, self.site.heads, -1).transpose(1, 2) for t in (K, V))
        x, mask, n = call["hidden_states"], call.get("attention_mask"), self.length
        causal = next((m.is_causal for m in self.site.module.modules() if hasattr(m, "is_causal")), False)
        if mask is None and causal and x.shape[1] > 1:
            tokens = x.shape[1]
            mask = torch.ones(1, 1, tokens, n + tokens, dtype=torch.bool, device=x.device).tril(n)
        elif mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 4:
                raise UserError("prefix needs attention masks as (batch, heads, tokens, keys); another form was given")
            mask = F.pad(mask, (n, 0), value=mask.dtype == torch.bool)
        return {"past_key_values": _Ahead(call.get("past_key_values"), K, V), "attention_mask": mask}

    def _moved(self, call: dict[str, Any]) -> dict[str, Any]:
        """The positions of a trunk's call, n further on."""
        at, past = call.get("position_ids"), call.get("past_key_values")
        if at is None:
            x = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
            begun = 0 if past is None else int(past.get_seq_length())
            at = torch.arange(begun, begun + x.shape[1], device=x.device)[None]
        return {"position_ids": at + self.length}


class _Ahead:
    """A key–value cache, or none, seen with a prefix: K and V (1, heads, n, head width) ahead of what it gives."""

    def __init__(self, cache: Any, K: Tensor, V: Tensor) -> None:
        self.cache, self.K, self.V = getattr(cache, "self_attention_cache", cache), K, V

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values (batch, heads, tokens, head width) to attend to; the cache's own has no prefix."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        K, V = (t.to(key.dtype).expand(len(key), -1, -1, -1) for t in (self.K, self.V))
        return torch.cat([K, key], 2), torch.cat([V, value], 2)


class Projection(nn.Module):
    """The paper's reparametrisation: all layers' K and V from one embedding by an MLP, once a forward."""

    def __init__(self, layers: int, length: int, width: int, hidden: int, seed: int) -> None:
        super().__init__()
        self.shape = (length, layers, 2, width)
        out = layers * 2 * width
        for name, shape, bound in (
            ("W1", (hidden, width), width),
            ("b1", (hidden,), width),
            ("W2", (out, hidden), hidden),
            ("b2", (out,), hidden),
        ):
            draw = torch.empty(shape).uniform_(-(bound**-0.5), bound**-0.5, generator=chance.generator(seed, name))
            setattr(self, name, nn.Parameter(draw))
        self.E = nn.Parameter(torch.randn(length, width, generator=chance.generator(seed, "E")))

    def prepare(self, ctx: Context) -> None:
        """Keep K and V of all layers, (L, 2, n, d_kv), for the pass."""
        every = F.linear(F.linear(self.E, self.W1, self.b1).tanh(), self.W2, self.b2)
        ctx.keep(self, every.view(self.shape).permute(1, 2, 0, 3).contiguous())


def _names(module: nn.Module) -> list[str]:
    """The names of what a module's own forward takes."""
    own = getattr(type(module), "_veneer_base", type(module))
    return list(inspect.signature(own.forward).parameters)[1:]
