"""4-bit normal-float storage of the frozen linear layers: QLoRA is ``lora+nf4``."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.adapted import Adapted
from veneer.core.hook import Storage
from veneer.core.registry import method
from veneer.core.site import Site, register_storage
from veneer.errors import UserError
from veneer.fields import At
from veneer.numerics import quantize
from veneer.numerics.fused import compute_dtype


@method("nf4", axis="base", paper="arXiv:2305.14314", system="048b", wants=("frozen-base",))
class NF4(Storage):
    """Frozen linear weights in 4 bits with one scale a block, the scales in 8 bits (Dettmers et al. 2023).

    W is cut row-major into blocks of 64; an entry becomes the nearest of the 16 normal-float levels times m = max|w| of
    its block: Ŵ = level[code]·m. With ``double_quant`` m less its mean is kept in the dynamic 8-bit type, in blocks of
    256 with an fp32 scale each. Storage is 4.127 bits a weight (4.5 without ``double_quant``) instead of bf16's 16.

    Every linear layer but the output head is converted, or those ``only`` names; embeddings, norms and biases stay. A
    converted layer is an `NF4Linear`, which dequantises Ŵ in forward and again in backward, keeps neither, and forms no
    gradient of W. Defaults are the paper's. Levels, codes, packing and rounding equal bitsandbytes'. Products run in
    the precision of the layer's input.
    """

    layers: ClassVar[tuple[str, ...]] = ("linear",)

    block_size: Annotated[
        Literal[32, 64, 128, 256, 512, 1024, 2048, 4096], At(doc="weights that share a scale", unit="weights")
    ] = 64
    double_quant: Annotated[bool, At(doc="keep the scales in 8 bits")] = True
    only: Annotated[tuple[str, ...], At(doc="paths of the layers to convert, or their last parts; globs too")] = ()

    def places(self, sites: list[Site]) -> list[Site]:
        """The sites whose layers run as a plain linear layer or transformers' Conv1D does."""
        chosen = [s for s in sites if s.kind == "linear" and (s.transposed or _is_plain(s.module))]
        if self.only:
            chosen = [s for s in chosen if any(s.named(n) for n in self.only)]
        busy = next((s for s in chosen if isinstance(s.module, Adapted)), None)
        if busy is not None:
            raise UserError(f"nf4 converts the base, but {busy.path} has an adapter already: detach it first")
        return chosen

    def convert(self, site: Site) -> None:
        """Quantise one layer in place; the parts of a fused projection are one layer."""
        if not isinstance(site.module, NF4Linear):
            quantise_layer(site.module, self.block_size, self.double_quant, site.transposed)


class NF4Linear(nn.Linear):
    """A linear layer whose weight is held in 4 bits, made by `quantise_layer` from another in place.

    State-dict keys beside ``bias``, n = out·in and b = ⌈n/block_size⌉: ``codes`` uint8 (⌈n/2⌉,), two a byte, the first
    in the high nibble; ``absmax`` fp32 (b,), or with double quantisation ``absmax_codes`` uint8 (b,), ``absmax_scales``
    fp32 (⌈b/256⌉,) and ``absmax_offset`` fp32 (). Loading takes a dense ``weight`` instead and quantises it. Scales
    stay fp32 when the model is cast; what changes is the type of ``weight``.
    """

    block_size: int
    double_quant: bool
    weight_dtype: torch.dtype
    born_transposed: bool  # it was a Conv1D, whose files hold the weight as in × out

    @property
    def weight(self) -> Tensor:
        """Ŵ (out, in), dequantised anew on every access."""
        absmax = self._buffers.get("absmax")
        if absmax is None:
            absmax = quantize.double_dequantise(self.absmax_codes, self.absmax_scales, self.absmax_offset)
        shape = (self.out_features, self.in_features)
        table = _table(self.codes.device)
        return quantize.dequantise_nibbles(self.codes, absmax, table, shape, self.block_size, self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _StoredProduct.apply(x, self.bias, self)

    def store(self, W: Tensor) -> None:
        """Take a dense W (out, in) into storage."""
        for name, value in self.quantised(W).items():
            self.register_buffer(name, value)

    def quantised(self, W: Tensor) -> dict[str, Tensor]:
        """The buffers that hold a dense W (out, in)."""
        codes, absmax = quantize.quantise_blocks(W, quantize.nfmap(4), self.block_size)
        packed = {"codes": quantize.pack(codes, 4)}
        if not self.double_quant:
            return packed | {"absmax": absmax}
        names = ("absmax_codes", "absmax_scales", "absmax_offset")
        return packed | dict(zip(names, quantize.double_quantise(absmax)))

    def extra_repr(self) -> str:
        scales = "8-bit scales" if self.double_quant else "fp32 scales"
        return f"{super().extra_repr()}, nf4, block_size={self.block_size}, {scales}"

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        scales = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)
        for name, before in scales.items():
            if self._buffers[name].dtype != before.dtype:
                self._buffers[name] = before.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        W = state_dict.pop(prefix + "weight", None)
        if W is not None:
            W = W.T if self.born_transposed else W
            if W.shape != (self.out_features, self.in_features):
                raise UserError(
                    f"{prefix}weight has shape {tuple(W.shape)}; the layer is {self.out_features}×{self.in_features}"
                )
            state_dict.update({prefix + name: value for name, value in self.quantised(W).items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def quantise_layer(layer: nn.Module, block_size: int = 64, double_quant: bool = True, transposed: bool = False) -> None:
    """Make a linear layer, or with ``transposed`` a Conv1D, an `NF4Linear` in place; its dense weight is let go."""
    W = layer._parameters["weight"].detach()
    W = W.T if transposed else W
    if not W.is_floating_point() or W.is_meta:
        raise UserError(f"nf4 takes a floating-point weight that is loaded, not {W.dtype} on {W.device}")
    del layer._parameters["weight"]
    layer.__class__ = NF4Linear
    layer.out_features, layer.in_features = W.shape
    layer.block_size, layer.double_quant = block_size, double_quant
    layer.weight_dtype, layer.born_transposed = W.dtype, transposed
    layer.store(W)


class _StoredProduct(torch.autograd.Function):
    """y = xŴᵀ + b, with Ŵ dequantised in both directions and nothing kept but the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: NF4Linear) -> Tensor:
        dtype = compute_dtype(x)
        ctx.layer, ctx.dtypes = layer, (dtype, x.dtype, None if bias is None else bias.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), layer.weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype, x_dtype, bias_dtype = ctx.dtypes
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad.to(dtype) @ ctx.layer.weight.to(dtype)).to(x_dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_bias, None


@cache
def _table(device: torch.device) -> Tensor:
    return quantize.pair_table(quantize.nfmap(4)).to(device)


def _is_plain(module: nn.Module) -> bool:
    """Whether the module computes what nn.Linear does, from a dense weight of its own."""
    own = type(module)._veneer_base if isinstance(module, Adapted) else type(module)
    return own.forward is nn.Linear.forward and module._parameters.get("weight") is not None


register_storage(NF4Linear, lambda layer: layer.weight)
