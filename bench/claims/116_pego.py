"""PEGO (arXiv:2407.15085): orthogonal groups of LoRAs, for domains that training did not see.

Domains are angles: digits turned by 0°, 90° and 180° to train and to choose rates, by 45° and 135° to test.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits, _judged
from bench.claims.verdicts import above

SEEN, UNSEEN = (0, 90, 180), (45, 135)


def turned(x: Tensor, degrees: float) -> Tensor:
    """Images (n, 8, 8) turned about their middle, bilinear."""
    a = math.radians(degrees)
    matrix = torch.tensor([[math.cos(a), -math.sin(a), 0.0], [math.sin(a), math.cos(a), 0.0]])
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), [len(x), 1, 8, 8], align_corners=False)
    return F.grid_sample(x[:, None], grid, align_corners=False)[:, 0]


class Angles(Digits):
    """Accuracy on angles that neither train nor choose the rate."""

    words = "digits at 0°, 90°, 180° → 45°, 135°, mlp 64-128-128-10, 200 images an angle, accuracy"

    def at(self, part: str, seed: int, angles: tuple[int, ...]) -> dict[str, Tensor]:
        """Columns of a part at every one of some angles."""
        rows = self.rows(part, seed, "none")
        x = [turned(rows["x"].reshape(-1, 8, 8), angle).flatten(1) for angle in angles]
        return {"x": torch.cat(x), "labels": rows["labels"].repeat(len(angles))}

    def rows(self, part: str, seed: int, change: str | None = None) -> dict[str, Tensor]:
        return super().rows(part, seed, change) if change else self.at(part, seed, SEEN)

    def validation(self, model, seed):
        return _judged(model, self.at("validation", seed, SEEN))["accuracy"]

    def scores(self, model, seed):
        new, old = (_judged(model, self.at("test", seed, angles)) for angles in (UNSEEN, SEEN))
        return {"test": new["accuracy"], "test_loss": new["loss"], "seen": old["accuracy"]}


CLAIM = Claim(
    number=116,
    name="pego",
    claim="Trained on several domains, a group of LoRAs held orthogonal is more accurate on a new one than plain LoRA.",
    task=Angles(widths=(64, 128, 128, 10), epochs=15),
    contestants={
        "pego": With("lora+pego(slices=2)", rank=8),
        "lora": With("lora", rank=8),
        "pego, a tenth of λ": With("lora+pego(slices=2, weight=1e-4)", rank=8),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=above("pego", "lora"),
    note="Rates are chosen on other images at the angles of training, as is usual where the new domain is unknown.",
)

if __name__ == "__main__":
    CLAIM.main()
