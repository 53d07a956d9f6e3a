"""What the names and the config of a model say about its parts: roles, blocks, heads, fused projections, ties.

Everything here reads and nothing writes. It is driven by the tables below, so that a new architecture is a new word in
a table. What an adapter has added to a model (children called ``veneer``) is never seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

ROLES = ("q", "k", "v", "o", "gate", "up", "down", "head", "embed", "norm", "bias", "other")
ATTENTION_ROLES = frozenset("qkvo")
MLP_ROLES = frozenset({"gate", "up", "down"})

# Attributes that hold the output head of a model, in the order in which they are looked for.
HEADS = ("lm_head", "classifier", "score", "qa_outputs", "classification_head", "head", "heads", "fc")

# Last names that say the role by themselves.
LEAVES = {
    leaf: role
    for role, leaves in {
        "q": "q q_proj q_lin query query_proj to_q wq q_attn linear_q",
        "k": "k k_proj k_lin key key_proj to_k wk linear_k",
        "v": "v v_proj v_lin value value_proj to_v wv linear_v",
        "o": "o o_proj out_proj out_lin",
        "gate": "gate_proj wi_0",
        "up": "up_proj wi wi_1 c_fc dense_h_to_4h",
        "down": "down_proj dense_4h_to_h",
    }.items()
    for leaf in leaves.split()
}

# Last names that need what stands before them; the first match counts. Plain fc1 and fc2 are only a block's when they
# sit in a numbered block or in something called an MLP, so that those of a small CNN stay "other".
_WITHIN = r"(^|\.)(\d+|\w*(mlp|ffn|feed_?forward)\w*)\."
CONTEXT = tuple(
    (role, re.compile(pattern, re.IGNORECASE))
    for role, pattern in (
        ("o", r"att\w*\.(\w*[a-z]\w*\.)*(c_proj|dense|proj|wo|to_out\.0)$"),
        ("up", r"(^|\.)intermediate\.dense$"),
        ("up", _WITHIN + r"(fc1|lin1|linear1|fc_in|w3)$"),
        ("down", _WITHIN + r"(fc2|lin2|linear2|fc_out|w2)$"),
        ("gate", _WITHIN + r"w1$"),
        ("down", r"(^|\.)(output\.dense|c_proj|wo)$"),
        ("embed", r"(^|\.)(\w*_)?embed(ding)?s?\."),
    )
)

# Fused projections whose rows lie one role after the other. The activated half of a gated pair is the gate.
FUSED = {
    **dict.fromkeys(("c_attn", "qkv_proj", "qkv", "Wqkv"), ("q", "k", "v")),
    **dict.fromkeys(("gate_up_proj", "weights_in", "Wi"), ("gate", "up")),
}
# Fused projections that interleave the roles head by head: no row range is one role.
INTERLEAVED = ("query_key_value",)
INTERLEAVED_TYPES = ("codegen",)


class Layer(NamedTuple):
    """An inner layer; ``rows`` is its row range when it is a part of a fused projection (path ``"…c_attn[q]"``)."""

    path: str
    module: nn.Module
    rows: slice | None


class Part(NamedTuple):
    """A module of a block (its MLP, its attention) and its inner layers by role."""

    path: str
    module: nn.Module
    layers: dict[str, Layer]


def named_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without what adapters have added; a shared module comes once."""
    return ((path, x) for path, x in model.named_modules(prefix=prefix) if "veneer" not in path.split("."))


def role(path: str, module: nn.Module, model: nn.Module) -> str:
    """The role of the layer, or of the parameter, at ``path``: one of ``ROLES``.

    ``path`` may be that of a fused row range (``"…c_attn[q]"``) or of a parameter (``"…norm.weight"``, where ``module``
    is its owner). The output head of ``model`` is told by identity. An undivided fused projection is ``"other"``.
    """
    if path.endswith("]"):
        return path[path.rindex("[") + 1 : -1]
    owner, _, leaf = path.rpartition(".")
    if leaf in module._parameters:
        if leaf.endswith("bias"):
            return "bias"
        path, leaf = owner, owner.rpartition(".")[2]
    if any("norm" in kind.__name__.lower() for kind in type(module).__mro__):
        return "norm"
    top = head(model)
    if top is not None and top is not model and (module is top or any(module is inner for inner in top.modules())):
        return "head"
    if isinstance(module, nn.Embedding):
        return "other" if leaf.endswith("bias") else "embed"
    if leaf in LEAVES:
        return LEAVES[leaf]
    return next((found for found, pattern in CONTEXT if pattern.search(path)), "other")


def block_index(path: str, model: nn.Module | None = None) -> int | None:
    """Index in the first ModuleList on ``path``, None outside of one.

    Without ``model`` the first number on the path counts, which for an nn.Sequential is not a block.
    Blocks of an encoder and of a decoder both count from 0.
    """
    names = path.split(".")
    for i, name in enumerate(names):
        if name.isdigit() and (model is None or isinstance(model.get_submodule(".".join(names[:i])), nn.ModuleList)):
            return int(name)
    return None


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks in the order of the model, as (path, module); of an encoder–decoder both stacks.

    They are the members of the outermost ModuleLists whose members have inner layers; where some have attention, those
    alone (a speech model's convolutional front is then not a block).
    """
    stacks: list[list[tuple[str, nn.Module]]] = []
    inside: list[str] = []
    for path, module in named_modules(model):
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer) for outer in inside):
            continue
        members = [(f"{path}.{name}" if path else name, member) for name, member in module.named_children()]
        if members and all(any(True for _ in member.children()) for _, member in members):
            stacks.append(members)
            inside.append(f"{path}." if path else "")
    attending = [stack for stack in stacks if any(_attends(member) for _, member in stack)]
    return [member for stack in attending or stacks for member in stack]


def _attends(module: nn.Module) -> bool:
    return any("attention" in type(inner).__name__.lower() or "attn" in path for path, inner in named_modules(module))


def trunk(model: nn.Module) -> nn.Module:
    """The model less its head: ``base_model`` of a transformers model, else (and of T5) the model itself."""
    return getattr(model, "base_model", model)


def head(model: nn.Module) -> nn.Module | None:
    """The output head: the output embeddings, else the module under the first of ``HEADS``, else None.

    Of a head that is an nn.Sequential it is the last linear layer.
    """
    embeddings = getattr(model, "get_output_embeddings", None)
    found = embeddings() if callable(embeddings) else None
    if found is None:
        found = next((x for x in (getattr(model, name, None) for name in HEADS) if isinstance(x, nn.Module)), None)
    if isinstance(found, nn.Sequential):
        found = ([x for x in found.modules() if isinstance(x, nn.Linear)] or [found])[-1]
    return found


def embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding: what the model itself calls so (of a ViT the patch module), else the first nn.Embedding."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    return next((x for _, x in named_modules(model) if isinstance(x, nn.Embedding)), None) if found is None else found


def text_config(model: nn.Module) -> object | None:
    """The config that counts the heads: that of the text part of a model with several; None of a model without one."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _fact(model: nn.Module, *names: str) -> int | None:
    """The first whole number under one of ``names`` in the config."""
    values = (getattr(text_config(model), name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def _attribute(model: nn.Module, name: str) -> int | None:
    """The first whole number under ``name`` on a module, for models without a config (nn.MultiheadAttention)."""
    return next((getattr(x, name) for _, x in named_modules(model) if isinstance(getattr(x, name, None), int)), None)


def heads(model: nn.Module, role: str = "q") -> int | None:
    """Attention heads: key–value heads for the roles k and v, query heads else; None where nothing says so."""
    config = text_config(model)
    if role in ("k", "v"):
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            return 1
        shared = _fact(model, "num_key_value_heads", "num_kv_heads")
        if shared is not None:
            return shared
    found = _fact(model, "num_attention_heads", "n_head", "n_heads", "num_heads")
    return _attribute(model, "num_heads") if found is None else found


def hidden_size(model: nn.Module) -> int | None:
    """Width of the trunk's hidden states; None where nothing says so."""
    return _fact(model, "hidden_size", "n_embd", "d_model", "dim")


def head_dim(model: nn.Module) -> int | None:
    """Width of one attention head; None where nothing says so."""
    found = _fact(model, "head_dim", "d_kv")
    if found is not None:
        return found
    width, count = hidden_size(model), heads(model)
    width = _attribute(model, "embed_dim") if width is None else width
    return width // count if width and count else None


def features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer or of transformers' Conv1D, whatever stores its weight; None of another layer."""
    if hasattr(module, "nf"):
        return module.nf, module.nx
    return (module.out_features, module.in_features) if hasattr(module, "out_features") else None


def fused_rows(path: str, module: nn.Module, model: nn.Module) -> dict[str, slice] | None:
    """Row ranges of the dense (out, in) weight by role, when ``module`` is a fused projection; None when it is not.

    Queries, keys and values have the config's sizes (grouped queries included); where those do not add up to the rows,
    three equal parts if there are three times as many rows as columns. A projection that interleaves the roles head by
    head (GPT-NeoX, BLOOM, Falcon) gives None.
    """
    roles, size = FUSED.get(path.rpartition(".")[2]), features(module)
    if roles is None or size is None:
        return None
    config = text_config(model)
    kind = getattr(config, "model_type", None)
    if kind in INTERLEAVED_TYPES or (kind == "gpt_bigcode" and not config.multi_query):
        return None
    out, width = size
    if len(roles) == 2:
        sizes = (out // 2, out // 2)
    else:
        query, key = ((heads(model, r) or 0) * (head_dim(model) or 0) for r in "qk")
        sizes = (query, key, key)
        if "crossattention" in path and out == 2 * key:
            roles, sizes = ("k", "v"), (key, key)
        elif sum(sizes) != out and out == 3 * width:
            sizes = (width, width, width)
    if sum(sizes) != out:
        return None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return {r: slice(start, start + rows) for r, start, rows in zip(roles, starts, sizes)}


def mlp_modules(model: nn.Module) -> list[Part]:
    """The MLP of each block with its layers by role (``up down``, ``gate`` if gated); of a mixture each expert's.

    Blocks that keep the two layers of their MLP apart (BERT, BART) have no such module and are left out.
    """
    return _parts(model, MLP_ROLES, ({"up", "down"},))


def attention_modules(model: nn.Module) -> list[Part]:
    """The attention of each block with its layers by role, cross-attention apart; ``qkv`` is one that interleaves."""
    return _parts(model, ATTENTION_ROLES | {"qkv"}, (set("qkvo"), {"qkv", "o"}))


def _parts(model: nn.Module, wanted: frozenset[str], complete: tuple[set[str], ...]) -> list[Part]:
    """The innermost modules strictly inside a block (or the model, if it has none) with a complete set of roles."""
    found = []
    for prefix, block in blocks(model) or [("", model)]:
        layers = [(r, layer) for r, layer in _layers(prefix, block, model) if r in wanted]
        whole: list[Part] = []
        for path, module in named_modules(block, prefix):
            inner = {r: layer for r, layer in layers if layer.path.startswith(f"{path}.")}
            if module is not block and any(need <= inner.keys() for need in complete):
                whole.append(Part(path, module, inner))
        found += [p for p in whole if not any(other.path.startswith(f"{p.path}.") for other in whole)]
    return found


def _layers(prefix: str, block: nn.Module, model: nn.Module) -> Iterator[tuple[str, Layer]]:
    for path, module in named_modules(block, prefix):
        if features(module) is None:
            continue
        rows = fused_rows(path, module, model)
        if rows:
            yield from ((r, Layer(f"{path}[{r}]", module, part)) for r, part in rows.items())
        elif path.rpartition(".")[2] in (*FUSED, *INTERLEAVED):
            yield "qkv", Layer(path, module, None)
        else:
            yield role(path, module, model), Layer(path, module, None)


def tied(model: nn.Module) -> list[list[str]]:
    """Groups of two or more parameter names that are one tensor, or lie at one address; in the order of the model."""
    groups: dict[object, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "veneer" in name.split("."):
            continue
        plain = type(parameter) is nn.Parameter and parameter.device.type != "meta" and parameter.numel() > 0
        key = (parameter.device, parameter.data_ptr(), parameter.numel()) if plain else id(parameter)
        groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]
