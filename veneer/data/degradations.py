"""What spoils a photograph, as functions on tensors, and PROD: several of them in random order on a clean image.

Images are (3, H, W) or (B, 3, H, W) in [0, 1]; what is random comes from a generator. PROD (Park et al. 2024, CoLoRA)
pre-trains a restoration network on such images; the paper names the functions, the ranges here are this
implementation's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

# The example tables of the JPEG standard (ITU-T T.81, annex K.1), for luminance and chrominance.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8 for _ in range(4)),
)  # fmt: skip
_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of ``sigma`` pixels, cut off at 3σ; beyond the border its pixels repeat."""
    reach = max(1, math.ceil(3 * sigma))
    line = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    line = line / line.sum()
    return _filtered(_filtered(image, line[None]), line[:, None])


def motion_blur(image: Tensor, length: float, angle: float) -> Tensor:
    """Blur along a line of ``length`` pixels at ``angle`` radians from the horizontal, counter-clockwise."""
    return _filtered(image, _line(length, angle))


def noise(image: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Add Gaussian noise of deviation ``sigma``, in the image's units."""
    return (image + sigma * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def rain(image: Tensor, density: float, length: float, angle: float, generator: Generator) -> Tensor:
    """Add bright streaks: a share ``density`` of the pixels starts one of ``length`` pixels at ``angle`` radians."""
    drops = (torch.rand(image[..., :1, :, :].shape, generator=generator) < density).float()
    streaks = _filtered(drops, _line(length, angle)) * length
    return (image + 0.6 * streaks.clamp(0, 1)).clamp(0, 1)


def jpeg(image: Tensor, quality: int) -> Tensor:
    """The image after JPEG at ``quality`` (1 to 100) with the standard's tables, chroma at full size."""
    height, width = image.shape[-2:]
    whole = F.pad(image if image.ndim == 4 else image[None], (0, -width % 8, 0, -height % 8), mode="replicate")
    matrix, scale = torch.tensor(_YCC), 5000 // quality if quality < 50 else 200 - 2 * quality
    planes = torch.einsum("ij,bjhw->bihw", matrix, (whole * 255).round()).round()
    planes[:, 0] -= 128
    tables = torch.tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
    tables = ((tables * scale + 50) / 100).floor().clamp(1, 255)[:, None, None]
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)  # (B, 3, rows, columns, 8, 8)
    C = _cosines()
    blocks = C.T @ ((C @ blocks @ C.T / tables).round() * tables) @ C
    planes = blocks.transpose(3, 4).reshape(planes.shape)
    planes[:, 0] += 128
    back = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(matrix), planes.round())
    return (back.round().clamp(0, 255) / 255)[..., :height, :width].reshape(image.shape)


def prod(image: Tensor, generator: Generator, count: int | None = None) -> Tensor:
    """``count`` different degradations (1 to 5 when None, all as likely) in random order at random strength."""
    for place in order(generator, len(FUNCTIONS), count):
        image = FUNCTIONS[place](image, generator)
    return image


def order(generator: Generator, functions: int, count: int | None = None) -> list[int]:
    """``count`` different places below ``functions`` in random order; when None a random number of them, at least 1."""
    if count is None:
        count = int(torch.randint(1, functions + 1, (), generator=generator))
    return torch.randperm(functions, generator=generator)[:count].tolist()


def _between(low: float, high: float, generator: Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


FUNCTIONS: tuple[Callable[[Tensor, Generator], Tensor], ...] = (
    lambda x, g: gaussian_blur(x, _between(0.2, 3, g)),
    lambda x, g: motion_blur(x, _between(5, 25, g), _between(0, math.pi, g)),
    lambda x, g: noise(x, _between(0, 50 / 255, g), g),
    lambda x, g: jpeg(x, round(_between(30, 95, g))),
    lambda x, g: rain(x, _between(1e-3, 1e-2, g), _between(5, 15, g), _between(1.2, 1.9, g), g),
)


def _filtered(image: Tensor, kernel: Tensor) -> Tensor:
    """Each channel under one kernel of odd sides, the border's pixels repeated."""
    whole = image if image.ndim == 4 else image[None]
    channels, (rows, columns) = whole.shape[1], kernel.shape
    whole = F.pad(whole, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    return F.conv2d(whole, kernel.expand(channels, 1, rows, columns), groups=channels).reshape(image.shape)


def _line(length: float, angle: float) -> Tensor:
    """A square kernel of sum 1 that holds a line through its middle, each of its points shared by four pixels."""
    half = max(1, math.ceil((length - 1) / 2))
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, 4 * half + 1)
    x, y = half + along * math.cos(angle), half - along * math.sin(angle)
    kernel = torch.zeros(2 * half + 2, 2 * half + 2)
    left, top = x.floor().long(), y.floor().long()
    for i in (0, 1):
        for j in (0, 1):
            share = (1 - (x - left - j).abs()) * (1 - (y - top - i).abs())
            kernel.index_put_((top + i, left + j), share, accumulate=True)
    return kernel[:-1, :-1] / kernel[:-1, :-1].sum()


def _cosines() -> Tensor:
    """The orthonormal cosine transform of eight samples."""
    k = torch.arange(8.0)
    C = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    C[0] /= 2**0.5
    return C
