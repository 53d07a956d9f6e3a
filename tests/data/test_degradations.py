"""What spoils images, against Pillow, scipy and closed forms; PROD's orders as in sheet 004."""

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from veneer.data.degradations import FUNCTIONS, gaussian_blur, jpeg, motion_blur, noise, order, prod, rain


def draws(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


def picture(height: int = 40, width: int = 37) -> Tensor:
    """A smooth image with some texture, in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    smooth = torch.stack([(x + y).sin(), (x * y).cos(), (x - 2 * y).sin()]) * 0.4 + 0.5
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=draws())).clamp(0, 1)


@pytest.mark.parametrize("quality", [30, 47, 75])
def test_jpeg_is_pillows(quality):
    image_module = pytest.importorskip("PIL.Image")
    image, file = (picture() * 255).round() / 255, io.BytesIO()
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    image_module.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    theirs = torch.tensor(np.asarray(image_module.open(file))).permute(2, 0, 1) / 255
    error, lost = ((a - theirs).square().mean().sqrt() for a in (jpeg(image, quality), image))
    assert error < 0.3 * lost  # libjpeg takes the cosine transform to eighths: a few coefficients round the other way
    assert (jpeg(image, quality) - theirs).abs().median() < 0.5 / 255  # most pixels are the same


def test_a_gaussian_blur_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = picture()
    theirs = [ndimage.gaussian_filter(c, 1.5, mode="nearest", radius=5) for c in image.double().numpy()]
    assert torch.allclose(gaussian_blur(image, 1.5), torch.tensor(np.stack(theirs)).float(), atol=1e-6)


def test_motion_blur_is_a_mean_along_its_line():
    image = picture()
    across = motion_blur(image, 5, 0.0)[:, 10, 15]
    share = torch.tensor([1, 2, 2, 2, 1]) / 8  # nine points half a pixel apart
    assert torch.allclose(across, image[:, 10, 13:18] @ share, atol=0.02)
    assert torch.allclose(motion_blur(image.mT.contiguous(), 7, math.pi / 2), motion_blur(image, 7, 0.0).mT, atol=1e-5)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.5])
def test_blurs_keep_a_flat_image_and_follow_their_angle(angle):
    flat = torch.full((3, 30, 30), 0.3)
    for blurred in (gaussian_blur(flat, 2.0), motion_blur(flat, 9, angle)):
        assert torch.allclose(blurred, flat, atol=1e-6)
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    streak = motion_blur(point, 15, angle)[0]
    y, x = torch.meshgrid(20 - torch.arange(41.0), torch.arange(41.0) - 20, indexing="ij")
    spread = torch.stack([x.flatten(), y.flatten()])
    _, vectors = torch.linalg.eigh((spread * streak.flatten()) @ spread.T)
    found = math.atan2(vectors[1, -1], vectors[0, -1]) % math.pi
    assert found == pytest.approx(angle, abs=0.05)


def test_noise_has_its_deviation_and_rain_only_brightens():
    grey = torch.full((3, 60, 60), 0.5)
    assert (noise(grey, 0.1, draws()) - grey).std().item() == pytest.approx(0.1, rel=0.05)
    wet = rain(grey, 0.01, 9, 1.5, draws())
    assert (wet >= grey).all() and 0.02 < (wet > grey + 0.1).float().mean() < 0.4
    assert torch.allclose(wet[0], wet[2])  # streaks have no colour


def test_nothing_is_the_identity_and_a_seed_is_an_image():
    image = picture()
    assert torch.equal(prod(image, draws(), count=0), image)
    assert torch.equal(prod(image, draws(3)), prod(image, draws(3)))
    assert not torch.equal(prod(image, draws(3)), prod(image, draws(4)))


def test_every_order_is_reached():
    generator = draws()
    assert len({tuple(order(generator, 3)) for _ in range(10_000)}) == 15  # ordered, non-empty subsets


@pytest.mark.parametrize("place", range(len(FUNCTIONS)))
def test_each_function_changes_an_image_or_a_batch_and_stays_in_range(place):
    for image in (picture(), torch.stack([picture(), picture().flip(1)])):
        spoilt = FUNCTIONS[place](image, draws(5))
        assert spoilt.shape == image.shape and not torch.equal(spoilt, image)
        assert spoilt.min() >= 0 and spoilt.max() <= 1 + 1e-6
