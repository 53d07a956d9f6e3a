"""SPAN: a small convolutional network that enlarges images, with attention that has no parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.models.networks.restored import Restored


class SPAB(nn.Module):
    """Three convolutions whose output, through a centred sigmoid, is also its own attention map.

    o1 = c1(x), o2 = c2(silu(o1)), o3 = c3(silu(o2)), y = (o3 + x)·(σ(o3) − ½). ``a1`` and ``a2`` are modules of their
    own so that their outputs can be named as feature maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.a1, self.a2 = nn.SiLU(), nn.SiLU()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, silu(o1)) of x (B, C, h, w)."""
        inner = self.a1(self.c1(x))
        out = self.c3(self.a2(self.c2(inner)))
        return (out + x) * (torch.sigmoid(out) - 0.5), inner


class SPAN(nn.Module):
    """Swift parameter-free attention network (Wan et al. 2024; the sizes of DSCLoRA's: 26 channels, 6 blocks, ×4).

    h = stem(x − mean); the blocks in turn; y = shuffle(up(cat(h, tail(last), first block, last block's first
    convolution, activated))) + x enlarged by cubic interpolation. The published network has no such skip and computes
    in [0, 255]: with the skip a small one learns in a minute.

    Args:
        channels: C of every convolution.
        blocks: how many SPABs, at least 1.
        scale: by what factor the image grows.
    """

    def __init__(self, channels: int = 26, blocks: int = 6, scale: int = 4) -> None:
        super().__init__()
        self.sizes = {"channels": channels, "blocks": blocks, "scale": scale}
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(SPAB(channels) for _ in range(blocks))
        self.tail = nn.Conv2d(channels, channels, 3, padding=1)
        self.cat = nn.Conv2d(4 * channels, channels, 1)
        self.up = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Restored:
        """Enlarge images (B, 3, h, w) in [0, 1] to (B, 3, scale·h, scale·w); ``labels`` are the true ones."""
        h = y = self.stem(pixel_values - self.mean)
        outputs = []
        for block in self.blocks:
            y, inner = block(y)
            outputs.append(y)
        y = self.up(self.cat(torch.cat([h, self.tail(y), outputs[0], inner], dim=1)))
        scale = self.sizes["scale"]
        image = F.pixel_shuffle(y, scale) + F.interpolate(pixel_values, scale_factor=scale, mode="bicubic")
        return Restored.of(image, labels)
