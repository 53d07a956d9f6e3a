"""Tasks on photographs: patches of the two pictures that scikit-learn carries, for networks that enlarge or restore.

The left 400 columns of each picture are trained on, in patches; columns 410 to 500 choose rates, and those from 510 on
are the test, each as a whole. Scores are peak signal-to-noise ratios in dB, means over the pictures. Seeds fix what is
drawn: base networks, patches, the order of batches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.claims.tasks import Batches, Task, descend, pretrained
from veneer.data.degradations import prod
from veneer.models.networks import SPAN, NAFNet, psnr

COLUMNS = {"train": (0, 400), "validation": (410, 500), "test": (510, 638)}


@cache
def pictures() -> tuple[Tensor, ...]:
    """The pictures (3, 427, 640) in [0, 1]: a palace, a flower."""
    from sklearn.datasets import load_sample_images

    return tuple(torch.tensor(p).permute(2, 0, 1).float() / 255 for p in load_sample_images().images)


@cache
def patches(side: int) -> Tensor:
    """Square patches (n, 3, side, side) of what is trained on, overlapping by half."""
    cut = [p.unfold(1, side, side // 2).unfold(2, side, side // 2) for p in region("train")]
    return torch.cat([c.permute(1, 2, 0, 3, 4).reshape(-1, 3, side, side) for c in cut]).contiguous()


def region(part: str) -> Tensor:
    """A part of both pictures (2, 3, 424, columns)."""
    first, last = COLUMNS[part]
    return torch.stack([p[:, :424, first:last] for p in pictures()])


@torch.no_grad()
def judged(network: nn.Module, rows: dict[str, Tensor]) -> float:
    """PSNR of what the network makes of ``pixel_values`` against ``labels``."""
    was = network.training
    image = network.eval()(rows["pixel_values"]).image
    network.train(was)
    return psnr(image, rows["labels"])


@dataclass(frozen=True)
class Enlarging(Task):
    """Twice the size: a small SPAN trained on 16 × 16 patches and their originals, then trained on with an adapter.

    ``channels`` are the student's and ``teacher_channels`` the teacher's, both with three blocks; ``epochs`` the
    adapter's. The bases train for ``base_epochs`` at 4e-3 and as many at 5e-4.
    """

    channels: int = 12
    teacher_channels: int = 24
    base_epochs: int = 4
    epochs: int = 2
    batch: int = 16

    @property
    def words(self) -> str:
        """The task in words."""
        return f"×2 of 32×32 patches of two photographs, SPAN with {self.channels} channels, PSNR in dB"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, cosine."""
        plain = {"task": "regression", "schedule": "cosine", "clip": 0.0, "weight_decay": 0.0, "precision": "fp32"}
        return plain | {"epochs": self.epochs, "batch_size": self.batch}

    def model(self, seed: int) -> nn.Module:
        """A copy of the student of this seed."""
        return copy.deepcopy(_span(self.channels, self.base_epochs, seed))

    def teacher(self) -> nn.Module:
        """The larger network, the same for all seeds."""
        return _span(self.teacher_channels, self.base_epochs, 0)

    def rows(self, part: str) -> dict[str, Tensor]:
        """Columns pixel_values (n, 3, h, w) and labels (n, 3, 2h, 2w)."""
        clean = patches(32) if part == "train" else region(part)
        small = F.interpolate(clean, scale_factor=0.5, mode="bicubic", antialias=True, align_corners=False)
        return {"pixel_values": small.clamp(0, 1), "labels": clean}

    def data(self, seed: int) -> Batches:
        """Batches of the training patches."""
        return Batches(self.rows("train"), self.batch, seed)

    def calibration(self, seed: int) -> list[Any]:
        """The first epoch's first four batches."""
        return list(self.data(seed))[:4]

    def validation(self, model: nn.Module, seed: int) -> float:
        """PSNR on the columns between training and test."""
        return judged(model, self.rows("validation"))

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """PSNR on the right of the pictures."""
        return {"test": judged(model, self.rows("test"))}


@cache
def _span(channels: int, epochs: int, seed: int) -> nn.Module:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return SPAN(channels, blocks=3, scale=2)

    def train(network: nn.Module) -> None:
        batches = Batches(Enlarging().rows("train"), 16, seed)
        for lr in (4e-3, 5e-4):
            descend(network, batches, epochs, lr)

    return pretrained({"span": channels, "epochs": epochs, "seed": seed, "version": 1}, make, train)


@dataclass(frozen=True)
class Restoring(Task):
    """Haze and lost pixels, which the base has not seen: a small NAFNet pre-trained by PROD, then adapted to patches.

    The base, one for all seeds, trains on patches spoilt anew by ``data.degradations.prod``, for ``base_steps`` of
    eight; ``prod`` False leaves it at random weights, the seed's own. The new task has ``shots`` patches of 32 × 32:
    haze of 20 to 60 % and 15 % of all pixels black, the same in every epoch.
    """

    channels: int = 8
    base_steps: int = 1200
    prod: bool = True
    shots: int = 64
    epochs: int = 12
    batch: int = 8

    @property
    def words(self) -> str:
        """The task in words."""
        base = "PROD" if self.prod else "no pre-training"
        return f"{base} → haze and lost pixels in {self.shots} 32×32 patches of two photographs, NAFNet, PSNR in dB"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, cosine."""
        plain = {"task": "regression", "schedule": "cosine", "clip": 1.0, "weight_decay": 0.0, "precision": "fp32"}
        return plain | {"epochs": self.epochs, "batch_size": self.batch}

    def model(self, seed: int) -> nn.Module:
        """A copy of the base, or the untrained network of this seed."""
        steps, own = (self.base_steps, 0) if self.prod else (0, seed)
        return copy.deepcopy(_naf(self.channels, steps, own))

    def rows(self, part: str, seed: int = 0) -> dict[str, Tensor]:
        """Columns pixel_values and labels (n, 3, h, w); the seed chooses the training patches."""
        generator = torch.Generator().manual_seed(seed)
        clean = region(part)
        if part == "train":
            clean = patches(32)[torch.randperm(len(patches(32)), generator=generator)[: self.shots]]
        return {"pixel_values": hazy(clean, generator), "labels": clean}

    def data(self, seed: int) -> Batches:
        """Batches of the training patches."""
        return Batches(self.rows("train", seed), self.batch, seed)

    def calibration(self, seed: int) -> list[Any]:
        """The first epoch's first four batches."""
        return list(self.data(seed))[:4]

    def validation(self, model: nn.Module, seed: int) -> float:
        """PSNR on the columns between training and test."""
        return judged(model, self.rows("validation"))

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """PSNR on the right of the pictures."""
        return {"test": judged(model, self.rows("test"))}


def hazy(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, 3, h, w) behind grey haze, each behind its own, with 15 % of the pixels black."""
    share, grey = (0.2 + torch.rand(2, len(clean), 1, 1, 1, generator=generator) * 0.4).unbind()
    lost = torch.rand(clean[:, :1].shape, generator=generator) < 0.15
    return (clean * (1 - share) + share * (0.6 + grey)).masked_fill(lost, 0.0).clamp(0, 1)


@cache
def _naf(channels: int, steps: int, seed: int) -> nn.Module:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return NAFNet(channels)

    def train(network: nn.Module) -> None:
        generator, clean = torch.Generator().manual_seed(seed), patches(32)
        chosen = clean[torch.randint(len(clean), (8 * steps,), generator=generator)]
        spoilt = torch.stack([prod(image, generator) for image in chosen])
        for part, lr in ((slice(0, 6 * steps), 2e-3), (slice(6 * steps, None), 5e-4)):
            descend(network, Batches({"pixel_values": spoilt[part], "labels": chosen[part]}, 8, seed), 1, lr)

    return pretrained({"naf": channels, "steps": steps, "seed": seed, "version": 2}, make, train) if steps else make()
