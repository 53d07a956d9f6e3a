"""Layers of the known kinds as linear maps; convolutions with another kernel in the place of their own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}
CONVOLUTIONS = tuple(_CONVOLVE)


def type_named(module: nn.Module, name: str) -> bool:
    """Whether a class of that name is among the module's classes (for layers of packages not imported here)."""
    return any(c.__name__ == name for c in type(module).__mro__)


def shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of the dense view of a linear layer, a convolution or an embedding."""
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if type_named(module, "Conv1D"):
        return module.weight.shape[1], module.weight.shape[0]
    return module.weight.shape[0], module.weight[0].numel()


def dimensions(layer: nn.Module) -> int:
    """The spatial dimensions of a convolution: 1 or 2."""
    return len(layer.kernel_size)


def convolve(layer: nn.Module, x: Tensor, W: Tensor, b: Tensor | None, groups: int) -> Tensor:
    """Apply a dense ``W (out, in/groups · kernel)`` and a bias to ``x`` as ``layer`` applies its own.

    A subclass with a forward of its own (one that pads as TensorFlow does) runs that forward on the other kernel.
    """
    kernel = W.reshape(W.shape[0], -1, *layer.kernel_size)
    kind = _kind(layer)
    if _forward(layer) is not kind.forward:
        return _own(layer, x, kernel, b)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return _CONVOLVE[kind](x, kernel, b, layer.stride, padding, layer.dilation, groups)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output position of a convolution sees: ``(positions, in_channels · kernel)`` in fp32."""
    if _forward(layer) is _kind(layer).forward and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        flat = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        if dimensions(layer) == 1:
            x, flat = x[:, :, None], tuple((f, *v) for f, v in zip((1, 1, 0, 1), flat))
        rows = F.unfold(x.float(), *flat)
    else:  # each number of each group's window by a kernel of its own
        window = layer.weight[0].numel()
        one = torch.eye(window, device=x.device).repeat(layer.groups, 1)
        rows = convolve(layer, x.float(), one, None, layer.groups).flatten(2)
    return rows.transpose(1, 2).reshape(-1, rows.shape[1])


def _kind(layer: nn.Module) -> type[nn.Module]:
    return next(t for t in _CONVOLVE if isinstance(layer, t))


def _forward(layer: nn.Module) -> Callable[..., Tensor]:
    """The forward that the layer's class has without deltas."""
    return getattr(type(layer), "_veneer_base", type(layer)).forward


def _own(layer: nn.Module, x: Tensor, kernel: Tensor, b: Tensor | None) -> Tensor:
    kept = {name: layer._parameters[name] for name in ("weight", "bias")}
    layer._parameters.update(weight=kernel, bias=b)
    try:
        return _forward(layer)(layer, x)
    finally:
        layer._parameters.update(kept)
