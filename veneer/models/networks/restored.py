"""What a network that restores images gives, and how near it comes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Restored(NamedTuple):
    """An image (B, 3, H, W), in [0, 1] but for over- and undershoot, and the mean |image − labels|, if labels came."""

    loss: Tensor | None
    image: Tensor

    @classmethod
    def of(cls, image: Tensor, labels: Tensor | None) -> Restored:
        """An image with its loss against ``labels`` (B, 3, H, W)."""
        return cls(None if labels is None else (image - labels).abs().mean(), image)


@torch.no_grad()
def psnr(image: Tensor, clean: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: the mean over images (B, 3, H, W) in [0, 1], each clamped to that range."""
    error = (image.clamp(0, 1) - clean).double().square().flatten(1).mean(1)
    return float((-10 * torch.log10(error.clamp_min(1e-12))).mean())
