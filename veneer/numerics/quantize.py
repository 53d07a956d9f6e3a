"""Block-wise quantisation: normal-float codebooks (QLoRA, arXiv:2305.14314), double quantisation, 8-bit moments.

A tensor is flattened row-major and cut into blocks, the last of which may be short. Of every block m = max|w| is kept
in fp32 and every entry becomes the index of the level nearest to w/m. Codes, order and rounding are bitsandbytes'.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import UserError

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_TAIL = 0.9677083  # the quantile that becomes level ±1


def nfmap(bits: int) -> Tensor:
    """The 2^bits levels of the normal float, fp32 ascending in [−1, 1]; ``bits`` is 2, 3 or 4.

    Quantiles of N(0, 1): 2^(bits−1) − 1 negative levels, 0, and 2^(bits−1) positive ones, over the outermost. For 4
    bits it is the published table, which differs from the formula in the last digit of fp32.
    """
    if bits not in (2, 3, 4):
        raise UserError(f"there is a normal float of 2, 3 or 4 bits, not of {bits!r}")
    if bits == 4:
        return torch.tensor(NF4)
    return normal_quantiles(bits)


def normal_quantiles(bits: int) -> Tensor:
    """The formula behind `nfmap`, fp32: (2^bits,)."""
    half = 2 ** (bits - 1)
    below = torch.linspace(1 - _TAIL, 0.5, half, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, _TAIL, half + 1, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([below, above]))
    return (levels / levels[-1]).float()


def quantise_blocks(W: Tensor, levels: Tensor, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Codes and block maxima of W by a sorted codebook.

    Args:
        W: any shape and floating type, finite.
        levels: (k,) fp32 ascending within [−1, 1], k ≤ 256.
        block_size: entries a block, ≥ 1.

    Returns:
        ``(codes, absmax)``: uint8 (numel,) and fp32 (⌈numel/block_size⌉,). An entry halfway between two levels takes
        the lower; a block of zeros has absmax 0.
    """
    flat = _blocks(W, block_size)
    absmax = flat.abs().amax(1)
    if not torch.isfinite(absmax).all():
        raise UserError("cannot quantise a tensor that holds NaN or infinity")
    # Multiplying by the reciprocal, not dividing, is what gives the same codes as the reference.
    scaled = (flat * absmax.clamp_min(1e-38).reciprocal()[:, None]).clamp_(-1, 1)
    return _nearest(scaled.flatten()[: W.numel()], levels), absmax


def dequantise_blocks(
    codes: Tensor,
    absmax: Tensor,
    levels: Tensor,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """level·absmax of every entry, computed in fp32: the inverse of `quantise_blocks` up to its error."""
    values = levels.to(codes.device).index_select(0, codes.int())
    return _scale_blocks(values, absmax, block_size).view(shape).to(dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, uint8 (n,), as a stream of bits: uint8 (⌈n·bits/8⌉,).

    The first code takes the highest bits of the first byte: for 4 bits the even element sits in the high nibble.
    ``bits`` is 1 to 8.
    """
    if bits == 8:
        return codes
    if bits == 4:
        codes = F.pad(codes, (0, codes.numel() % 2))
        return (codes[::2] << 4) | codes[1::2]
    shifts = torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=codes.device)
    stream = ((codes[:, None] >> shifts) & 1).flatten()
    stream = F.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    places = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return (stream * places).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes, uint8, of what `pack` made."""
    if bits == 8:
        return packed[:count]
    if bits == 4:
        return torch.stack([packed >> 4, packed & 15], dim=1).flatten()[:count]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> shifts) & 1).flatten()[: count * bits].view(count, bits)
    places = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.uint8, device=packed.device)
    return (stream * places).sum(1, dtype=torch.uint8)


def pair_table(levels: Tensor) -> Tensor:
    """For each of the 256 bytes of packed 4-bit codes its two fp32 levels as one opaque 8-byte number: fp64 (256,)."""
    first, second = levels.repeat_interleave(16), levels.repeat(16)
    return torch.stack([first, second], dim=1).contiguous().view(torch.float64).flatten()


def dequantise_nibbles(
    packed: Tensor,
    absmax: Tensor,
    table: Tensor,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantise_blocks` of packed 4-bit codes, one look-up for every byte: about 0.4 ns a weight on one core.

    packed: uint8 (⌈numel/2⌉,); absmax: fp32 (blocks,); table: from `pair_table`, on the device of ``packed``.
    """
    values = table.index_select(0, packed.int()).view(torch.float32)
    numel = math.prod(shape)
    return _scale_blocks(values[:numel], absmax, block_size).view(shape).to(dtype)


@cache
def dynamic_map() -> Tensor:
    """The 256 levels of the signed dynamic 8-bit type, fp32 ascending (Dettmers et al. 2022, arXiv:2110.02861).

    For i = 0…6 the 2^i means of neighbours among 2^i + 1 even points of [0.1, 1], times ±10^(i−6); then 0 and 1. One
    tensor for all callers: not to be written to.
    """
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        positive.append((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])]).sort().values


def double_quantise(absmax: Tensor, block_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Block maxima in 8 bits (QLoRA's double quantisation).

    absmax: fp32 (n,). Returns ``(codes, scales, offset)``: uint8 (n,) in `dynamic_map` of absmax less its mean, the
    maxima of blocks of those, fp32 (⌈n/block_size⌉,), and the mean, fp32 ().
    """
    offset = absmax.mean()
    codes, scales = quantise_blocks(absmax - offset, dynamic_map(), block_size)
    return codes, scales, offset


def double_dequantise(codes: Tensor, scales: Tensor, offset: Tensor, block_size: int = 256) -> Tensor:
    """The block maxima, fp32 (n,), from what `double_quantise` gave."""
    return dequantise_blocks(codes, scales, dynamic_map(), tuple(codes.shape), block_size) + offset


def quantise_signed(
    m: Tensor, block_size: int = 256, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A first moment in 8 bits: int8 (numel,) and scales absmax/127, fp32 (⌈numel/block_size⌉,).

    Rounds to the nearest (error ≤ absmax/254), or with a CPU generator up or down at random, without bias: a change of
    less than half a step, which rounding to the nearest would lose every time, then counts on average.
    """
    flat = _blocks(m, block_size)
    scales = flat.abs().amax(1) / 127
    codes = _rounded(flat / _nonzero(scales)[:, None], generator).clamp_(-127, 127)
    return codes.flatten()[: m.numel()].to(torch.int8), scales


def dequantise_signed(codes: Tensor, scales: Tensor, shape: tuple[int, ...], block_size: int = 256) -> Tensor:
    """The first moment, fp32 of ``shape``."""
    return _scale_blocks(codes.float(), scales, block_size).view(shape)


def quantise_root(v: Tensor, block_size: int = 256, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A second moment v ≥ 0 in 8 bits, held as √v: uint8 (numel,) and scales max √v/255, fp32 (⌈numel/block_size⌉,).

    Rounds as `quantise_signed` does, but a positive v never becomes 0: its step m/√v would explode.
    """
    flat = _blocks(v, block_size).sqrt()
    scales = flat.amax(1) / 255
    codes = _rounded(flat / _nonzero(scales)[:, None], generator).clamp_(max=255)
    codes = torch.where(flat > 0, codes.clamp_min(1), codes)
    return codes.flatten()[: v.numel()].to(torch.uint8), scales


def dequantise_root(codes: Tensor, scales: Tensor, shape: tuple[int, ...], block_size: int = 256) -> Tensor:
    """The second moment v (not its root), fp32 of ``shape``."""
    return _scale_blocks(codes.float(), scales, block_size).square_().view(shape)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The index, uint8, of the level nearest to each x, the lower of two: how many midpoints lie below x."""
    middles = (levels[1:] + levels[:-1]) / 2
    if len(levels) > 16:
        return torch.bucketize(x, middles.to(x.device), out_int32=True).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for middle in middles.tolist():  # for a few levels several times as fast as a search
        codes += x > middle
    return codes


def _blocks(W: Tensor, block_size: int) -> Tensor:
    """W flattened as fp32 rows of ``block_size``, the last filled up with zeros."""
    flat = W.detach().reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def _scale_blocks(values: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply every block of the flat fp32 ``values`` by its scale, in place."""
    whole = values.numel() // block_size * block_size
    values[:whole].view(-1, block_size).mul_(scales[: whole // block_size, None])
    if whole < values.numel():
        values[whole:].mul_(scales[-1])
    return values


def _rounded(x: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return x.round()
    return (x + torch.rand(x.shape, generator=generator).to(x.device)).floor()


def _nonzero(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
