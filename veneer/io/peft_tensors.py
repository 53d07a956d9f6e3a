"""The tensor half of a PEFT directory: names and shapes of factors on disk for each kind of layer.

A key is ``base_model.model.`` + module path + ending. A linear layer's or a convolution's factors are modules
(``lora_A.weight``), an embedding's are parameters (``lora_embedding_A``). A convolution's A has the kernel's shape and
its B ones instead; its magnitude is (1, out, 1…). Vectors that scale rows or columns are kept as thin matrices, LoKr's
whole second factor with the kernel's shape. Everything else lies as in the dense view W: out × in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.core.site import Site
from veneer.errors import UserError
from veneer.io.peft_config import CONFIG, PREFIX
from veneer.io.peft_kinds import KINDS, layer_class
from veneer.models import architecture

FACTORS = {"lora_A": ("lora_A.weight", "lora_embedding_A"), "lora_B": ("lora_B.weight", "lora_embedding_B")}


TOKENS = "trainable_tokens_delta"


def _table(bare: str) -> str:
    """The name of the table whose rows a file holds under ``bare``."""
    return f"{bare.removesuffix('.' + TOKENS).removesuffix('.token_adapter')}.weight"


def endings(name: str) -> tuple[str, ...]:
    """The endings under which PEFT writes what a method's map calls ``name``, over all kinds of layers."""
    return FACTORS.get(name, (name,))


def ending(site: Site, name: str) -> str:
    """The ending of what a map calls ``name`` at this kind of layer."""
    return endings(name)[-1 if site.kind == "embedding" else 0]


def dense_shape(site: Site, name: str, rank: int) -> tuple[int, ...] | None:
    """The shape in the dense view, for the names whose shape the format fixes."""
    known = {
        "lora_A": (rank, site.in_features),
        "lora_B": (site.out_features, rank),
        "lora_magnitude_vector": (site.out_features,),
        "lora_B.bias": (site.out_features,),
    }
    return known.get(name)


def disk_shape(site: Site, name: str, shape: tuple[int, ...], on_input: bool = False) -> tuple[int, ...]:
    """The shape on disk of what a map calls ``name`` and the dense view gives ``shape``.

    ``on_input`` says of a vector that it scales the layer's inputs. A size may be −1, once.
    """
    if name in ("ia3_l", "boft_s"):
        return _thin(site, name, shape[0], on_input)
    if site.kind != "conv":
        return shape
    kernel = tuple(site.module.kernel_size)
    ones = (1,) * len(kernel)
    if name == "lokr_w2":
        return (shape[0], -1, *kernel)
    if name == "lora_A":
        return (shape[0], site.module.in_channels, *kernel)
    if name == "lora_B":
        return (*shape, *ones)
    return (1, shape[0], *ones) if name == "lora_magnitude_vector" else shape


def _thin(site: Site, name: str, size: int, on_input: bool) -> tuple[int, ...]:
    if site.kind != "conv":
        return (1, size) if on_input else (size, 1)
    return (1, size) if name == "boft_s" else (1, size, *(1 for _ in site.module.kernel_size))


def check_layer(site: Site, kind: str = "LORA") -> None:
    """Refuse the layers that PEFT does not take, or at which it computes something else than a change of W."""
    cls, known = layer_class(site), KINDS[kind].layers
    if cls not in known:
        raise UserError(
            f"{site.path} is a {cls}, at which PEFT's {kind} does nothing sound: it takes {', '.join(known)}"
        )
    if site.kind != "conv":
        return
    m = site.module
    odd = {
        "groups": m.groups > 1,
        "dilation": any(d != 1 and k != 1 for d, k in zip(m.dilation, m.kernel_size)),
        "padding_mode": m.padding_mode != "zeros",
    }
    found = next((name for name, is_odd in odd.items() if is_odd), None)
    if found:
        raise UserError(
            f"{site.path} is a convolution with {found}={getattr(m, found)!r}, whose factors PEFT applies without it: "
            'no file can stand for a change of this layer; use another layer, or format="merged" to write it'
        )


@dataclass
class Content:
    """The tensors of a file, told apart: those of each adapted module by map name, and whole base tensors by name.

    ``under`` holds the base tensors that PEFT writes of layers that are adapted too, ``derived`` what the config tells
    already, ``tokens`` rows of tables by the table's name.
    """

    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    under: dict[str, Tensor] = field(default_factory=dict)
    derived: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)


def sort(
    tensors: Mapping[str, Tensor], names: Iterable[str], model: nn.Module, path: Path, derived: Iterable[str] = ()
) -> Content:
    """Tell the tensors of the file at ``path`` apart; raises UserError listing those without a place in ``model``."""
    ends = {end: name for name in names for end in endings(name)}
    modules = dict(architecture.named_modules(model))
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    content, lost = Content(), []
    for key, tensor in tensors.items():
        bare = key.removeprefix(PREFIX)
        owner, _, last = key.rpartition(".")
        end = next((e for e in ends if bare.endswith("." + e)), None)
        under = bare.replace(".base_layer.", ".")
        if end is not None and bare[: -len(end) - 1] in modules:
            content.sites.setdefault(bare[: -len(end) - 1], {})[ends[end]] = tensor
        elif last in derived and (owner in ("", "base_model") or owner.removeprefix(PREFIX) in modules):
            content.derived.setdefault(last, []).append(tensor)
        elif last == TOKENS and (name := _table(bare)) in own:
            content.tokens[name] = tensor
        elif under != bare and under in own:
            content.under[under] = tensor
        elif bare in own:
            content.base[bare] = tensor
        else:
            lost.append(key)
    if lost:
        shown = ", ".join(lost[:6]) + (f" and {len(lost) - 6} more" if len(lost) > 6 else "")
        raise UserError(
            f"{path}: {len(lost)} of {len(tensors)} tensors match nothing in this {type(model).__name__}: {shown}; "
            "load the adapter on the kind of model it was made for"
        )
    return content


def to_dense(site: Site, name: str, tensor: Tensor, rank: int, path: Path) -> Tensor:
    """A tensor from disk in the dense view, fp32; raises UserError when its shape on disk is not the layer's."""
    shape = dense_shape(site, name, rank)
    if shape is None:
        return _flat(name, tensor).to(torch.float32)
    wanted = disk_shape(site, name, shape)
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"{path}: {ending(site, name)} of {site.path} has shape {tuple(tensor.shape)}, where this model and rank "
            f"{rank} in {CONFIG} need {wanted}: it was made for another model or another rank"
        )
    return tensor.reshape(shape).to(torch.float32)


def _flat(name: str, tensor: Tensor) -> Tensor:
    if name in ("ia3_l", "boft_s"):
        return tensor.flatten()
    return tensor.flatten(1) if name == "lokr_w2" else tensor


def to_disk(site: Site, name: str, tensor: Tensor, on_input: bool = False) -> tuple[str, Tensor]:
    """The key and the tensor as PEFT keeps them, from the dense view; ``site`` is the whole layer."""
    tensor = tensor.detach().float().reshape(disk_shape(site, name, tuple(tensor.shape), on_input))
    return f"{PREFIX}{site.path}.{ending(site, name)}", tensor
