"""Faster, mathematically equal forms of known layers, swapped in for the length of a context.

For the Llama family of transformers: RMSNorm, the gated MLP, and causal self-attention with rotary embedding. Each form
looks at its module and its call, and where either is of another kind it runs the module's own forward. Outside of the
context the model is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer.models.fast_attention import Heads, Turn, additive, is_causal, rotary_attention
from veneer.models.fast_linear import Plain, branch_of, linear_group
from veneer.models.fast_mlp import gated_mlp, swiglu
from veneer.models.fast_norm import rms_norm
from veneer.models.fast_self_attention import self_attention
from veneer.models.packing import Packing

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
# Attention whose forward is projections, rotary embedding, softmax, projection, and nothing between them.
ATTENTION = ("Llama", "Mistral", "Qwen2")
SILU = ("SiLU", "SiLUActivation")
LONGEST = (
    8192  # tokens of a row up to which attention runs as batched products; a block's scores take batch·heads·64·8192
)


@contextmanager
def fast_forms(
    model: nn.Module, plain: Plain | None = None, leave: Collection[str] = (), packing: Packing | None = None
) -> Iterator[None]:
    """Run the known layers of ``model`` in their fast forms, in train and eval mode alike.

    Blocks under transformers' gradient checkpointing are recomputed in the same forms, after the context has ended too.

    Args:
        model: any module; what is not known runs as it is.
        plain: ``plain(layer)`` gives (weight, bias, A, B, scale, dropout, seed[, gain]) of a linear layer on which one
            plain low-rank pair acts, or None; see `veneer.numerics.lowrank.Branch`. Layers for which it gives None are
            called as modules.
        leave: kinds that run as they are: ``norm``, ``mlp``, ``attention``.
        packing: of the row that the model is given, when it is packed; only for a model that `packs`.
    """
    forms = _Forms(plain, leave, packing)
    replayed = []
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            own = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = partial(_checkpointed, own, forms, module)
            replayed.append((module, own))
    try:
        with forms.installed(model):
            yield
    finally:
        for module, own in replayed:
            module._gradient_checkpointing_func = own


def packs(model: nn.Module) -> bool:
    """Whether the model may be given packed rows: its positions meet in known attention alone."""
    config, names = getattr(model, "config", None), {f"{family}ForCausalLM" for family in ATTENTION}
    return (
        # among its classes: sharding puts another in front
        any(c.__name__ in names and c.__module__.startswith("transformers.models.") for c in type(model).__mro__)
        and config._attn_implementation in ("sdpa", "eager")
        and getattr(config, "sliding_window", None) is None
        and next(model.parameters()).device.type == "cpu"
    )


def _checkpointed(own: Callable, forms: _Forms, module: nn.Module, function: Callable, *args: Any) -> Any:
    """Checkpoint a call that, when it is made again in backward, finds the forms in place."""

    def run(*args: Any) -> Any:
        with forms.installed(module):
            return function(*args)

    return own(run, *args)


class _Forms:
    """The forms of one pass, and what its calls share."""

    def __init__(self, plain: Plain | None, leave: Collection[str], packing: Packing | None = None) -> None:
        self.plain, self.packing = plain, packing
        self.known = {kind: form for kind, form in _FORMS.items() if kind not in leave}
        self.mask: tuple[Tensor, torch.dtype, Tensor | None] | None = None
        self.turned: tuple[Tensor, Turn] | None = None

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Put the forms on the modules of ``model`` that have none; take off on leaving what was put on."""
        mine = []
        try:
            for module in _within(model):
                form = self.known.get(_kind(module))
                if form is not None and "forward" not in module.__dict__:
                    module.__dict__["forward"] = partial(form, self, module)
                    mine.append(module)
            yield
        finally:
            for module in mine:
                del module.__dict__["forward"]

    def turn(self, cos: Tensor, sin: Tensor, heads: int) -> Turn:
        """The rotation of this pass for so many heads; every layer gets the same, so it is made once."""
        if self.turned is None or self.turned[0] is not cos or self.turned[1].cos.shape[-1] != heads * cos.shape[-1]:
            rows = slice(None) if self.packing is None else self.packing.longest
            self.turned = (cos, Turn.of(cos[:, rows], sin[:, rows], heads))
        return self.turned[1]

    def added_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The mask of this pass to be added to scores, or None when it does not forbid the columns that come later.

        Every layer gets the same mask, so it is made once.
        """
        if self.mask is None or self.mask[0] is not mask or self.mask[1] != dtype:
            self.mask = (mask, dtype, additive(mask, dtype) if is_causal(mask) else None)
        return self.mask[2]


def _within(model: nn.Module) -> Iterator[nn.Module]:
    """The modules below ``model``, but for those that another package's checkpointing would run again without us."""
    yield model
    for child in model.children():
        if type(child).__name__ != "CheckpointWrapper":
            yield from _within(child)


def _kind(module: nn.Module) -> str:
    """``norm``, ``mlp`` or ``attention`` of a known family, else an empty string."""
    cls = type(module)
    if not cls.__module__.startswith("transformers.models."):
        return ""
    for ending, kind in (("RMSNorm", "norm"), ("MLP", "mlp"), ("Attention", "attention")):
        if cls.__name__.endswith(ending):
            known = ATTENTION if kind == "attention" else FAMILIES
            return kind if cls.__name__.removesuffix(ending) in known else ""
    return ""


def _own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _in_one_precision(x: Tensor, *weights: Tensor) -> bool:
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return not autocast and x.is_floating_point() and all(w.dtype == x.dtype for w in weights)


def _norm(forms: _Forms, module: nn.Module, x: Tensor) -> Tensor:
    if not _in_one_precision(x, module.weight):
        return _own(module, x)
    return rms_norm(x, module.weight, module.variance_epsilon)


def _mlp(forms: _Forms, module: nn.Module, x: Tensor) -> Tensor:
    if type(module.act_fn).__name__ not in SILU or not _in_one_precision(x):
        return _own(module, x)
    layers = (module.gate_proj, module.up_proj, module.down_proj)
    branches = [branch_of(m, forms.plain, x.dtype) for m in layers]
    if None not in branches:
        return gated_mlp(x, *branches)
    if None not in branches[:2]:
        gate, up = linear_group(x, branches[:2])
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(swiglu(gate, up))


def _attention(
    forms: _Forms,
    module: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    x, mask, packing = hidden_states, attention_mask, forms.packing
    usable = _attention_fits(module, x, position_embeddings, past_key_values, kwargs, packing)
    if packing is not None:
        mask = None if usable else forms.added_mask(packing.own_mask(), x.dtype)
        attention_mask = mask
    elif usable and mask is not None:
        usable = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
        mask = forms.added_mask(mask, x.dtype) if usable else None
        usable = mask is not None
    if not usable:
        given = {"position_embeddings": position_embeddings, "past_key_values": past_key_values, **kwargs}
        return _own(module, hidden_states=x, attention_mask=attention_mask, **given)
    layers = (module.q_proj, module.k_proj, module.v_proj)
    branches = [branch_of(m, forms.plain, x.dtype) for m in (*layers, module.o_proj)]
    size, whole = module.head_dim, None not in branches
    if whole:
        parts, widths = [], [b.width for b in branches[:3]]
    else:
        parts = [m(x) for m in layers] if None in branches[:3] else linear_group(x, branches[:3])
        widths = [t.shape[-1] for t in parts]
    heads = Heads(widths[0] // size, widths[1] // size, size, module.scaling)
    turn = forms.turn(*position_embeddings, heads.queries + heads.groups)
    if whole:
        return self_attention(x, branches, turn, mask, heads, packing), None
    out = rotary_attention(torch.cat(parts, -1), turn, mask, heads, packing)
    return (module.o_proj(out) if branches[3] is None else linear_group(out, branches[3:])[0]), None


def _attention_fits(
    module: nn.Module, x: Tensor, turn: Any, cache: Any, kwargs: dict[str, Any], packing: Packing | None
) -> bool:
    """Whether a call is causal attention of a sequence on itself that the batched products serve.

    Elsewhere than on the CPU torch's own kernels are faster.
    """
    time, config = x.shape[1] if packing is None else packing.source.shape[1], module.config
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    return (
        x.device.type == "cpu"
        and _in_one_precision(x)
        and turn is not None
        and cache is None
        and turn[0].dtype == x.dtype
        and turn[0].shape[-1] == module.head_dim
        and time <= LONGEST
        and (window is None or time <= window)
        and config._attn_implementation in ("sdpa", "eager")
        and not (module.training and module.attention_dropout)
        and not kwargs.get("output_attentions", config.output_attentions)
    )


_FORMS: dict[str, Callable[..., Any]] = {"norm": _norm, "mlp": _mlp, "attention": _attention}
