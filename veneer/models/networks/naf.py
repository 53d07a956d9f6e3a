"""NAFNet: a small U-shaped network that restores images, without activation functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.models.networks.restored import Restored


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position: x (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6).movedim(-1, 1)


class NAFBlock(nn.Module):
    """x + β·f(norm(x)), then + γ·g(norm(x)): depthwise mixing with channel attention, then a gated feed-forward.

    A gate multiplies one half of the channels by the other; β and γ (C,) start at 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.norm1, self.norm2 = ChannelNorm(c), ChannelNorm(c)
        self.expand, self.depth = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.attention, self.project = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.wide, self.narrow = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.beta, self.gamma = nn.Parameter(torch.zeros(c, 1, 1)), nn.Parameter(torch.zeros(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = _gate(self.depth(self.expand(self.norm1(x))))
        y = y * self.attention(y.mean((2, 3), keepdim=True))
        x = x + self.beta * self.project(y)
        return x + self.gamma * self.narrow(_gate(self.wide(self.norm2(x))))


class NAFNet(nn.Module):
    """A network for degraded images that keeps their size (Chen et al. 2022), with a skip from input to output.

    Args:
        channels: C at full size; doubled at each level down.
        encoder: blocks before each halving of the size.
        middle: blocks at the smallest size.
        decoder: blocks after each doubling, as many entries as ``encoder``.
    """

    def __init__(
        self,
        channels: int = 16,
        encoder: tuple[int, ...] = (1, 1),
        middle: int = 1,
        decoder: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        encoder, decoder = tuple(encoder), tuple(decoder)
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder and decoder must have as many levels, got {encoder} and {decoder}")
        self.sizes = {"channels": channels, "encoder": encoder, "middle": middle, "decoder": decoder}
        widths = [channels * 2**i for i in range(len(encoder) + 1)]
        self.intro, self.ending = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.encoders = nn.ModuleList(_blocks(w, n) for w, n in zip(widths, encoder))
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.middle = _blocks(widths[-1], middle)
        self.ups = nn.ModuleList(nn.Conv2d(2 * w, 4 * w, 1, bias=False) for w in reversed(widths[:-1]))
        self.decoders = nn.ModuleList(_blocks(w, n) for w, n in zip(reversed(widths[:-1]), decoder))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Restored:
        """Restore images (B, 3, H, W) in [0, 1]; ``labels`` are the clean ones."""
        height, width = pixel_values.shape[-2:]
        step = 2 ** len(self.encoders)
        padded = F.pad(pixel_values, (0, -width % step, 0, -height % step))
        x, skips = self.intro(padded), []
        for blocks, down in zip(self.encoders, self.downs):
            x = blocks(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for blocks, up in zip(self.decoders, self.ups):
            x = blocks(F.pixel_shuffle(up(x), 2) + skips.pop())
        image = (padded + self.ending(x))[..., :height, :width]
        return Restored.of(image, labels)


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(NAFBlock(channels) for _ in range(count)))


def _gate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return first * second
