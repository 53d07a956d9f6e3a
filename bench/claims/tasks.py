"""What a task is, and the digits protocols: a small net pretrained on upright digits, adapted to changed ones.

``Digits()`` is the rotated-digits protocol: an MLP 64-256-256-10 trained for 25 epochs on 1200 upright scikit-learn
digits (AdamW 1e-3, batch 64), then adapted for 40 epochs (batch 32, AdamW without decay, constant rate) to 200 of the
same images turned by 90°. Rates are chosen on 400 other training images, turned; the 597 test images are seen once.
A seed fixes the split, the base network, the images and their order, so that contestants are paired by it.

Language models are in ``texts``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import UserError, nearest

SCRATCH = Path(tempfile.gettempdir()) / "veneer-claims"
TRAINED, TESTED = 1200, 597  # of the 1797 digits
VALIDATED = 400


class Batches:
    """Shuffled batches of rows; the order is a function of seed and epoch alone.

    ``columns`` are tensors of equal length by name; a batch is a mapping of their rows.
    """

    def __init__(self, columns: dict[str, Tensor], size: int, seed: int = 0, shuffle: bool = True) -> None:
        self.columns, self.size, self.seed, self.shuffle, self.number = columns, size, seed, shuffle, 0

    def set_epoch(self, number: int) -> None:
        """The epoch that is iterated next."""
        self.number = number

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(self.rows)
        if self.shuffle:
            order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(1000 * self.seed + self.number))
        for rows in order.split(self.size):
            yield {name: column[rows] for name, column in self.columns.items()}

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return len(next(iter(self.columns.values())))


class Task:
    """A base, data to adapt it on, and scores. Derived classes are frozen dataclasses of their settings.

    ``test`` is the score that counts (``higher`` says which way is better), ``validation`` the same on other data, by
    which rates are chosen. ``fit`` are settings of ``veneer.fit``.
    """

    higher = True
    words = ""

    @property
    def fit(self) -> dict[str, Any]:
        """Settings for ``veneer.fit``, ``lr`` and ``seed`` left out."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What the JSON says of the task."""
        return json.loads(json.dumps({"name": type(self).__name__, "words": self.words, **asdict(self)}))

    def model(self, seed: int) -> nn.Module:
        """A fresh copy of the base."""
        raise NotImplementedError

    def data(self, seed: int) -> Any:
        """The training data, as ``veneer.fit`` takes it."""
        raise NotImplementedError

    def calibration(self, seed: int) -> list[Any]:
        """A few training batches with labels, for recipes that look at data before they start."""
        raise NotImplementedError

    def validation(self, model: nn.Module, seed: int) -> float:
        """The score by which rates are chosen."""
        raise NotImplementedError

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """``test`` and whatever else there is to say (``kept``: the score left on what the base could do)."""
        raise NotImplementedError


def pretrained(facts: dict[str, Any], make: Callable[[], nn.Module], train: Callable[[nn.Module], None]) -> nn.Module:
    """The net that ``make`` gives and ``train`` has trained; kept in the scratch folder by its facts."""
    from safetensors.torch import load_file, save_file

    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    path, net = SCRATCH / "bases" / f"{key}.safetensors", make()
    if path.is_file():
        net.load_state_dict(load_file(path), strict=False)
        return net.eval()
    train(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {n: t.clone() for n, t in net.state_dict().items()}
    save_file(own, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return net.eval()


def descend(net: nn.Module, batches: Batches, epochs: int, lr: float) -> None:
    """Plain AdamW without decay on a net whose forward gives a loss."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    net.train()
    for number in range(epochs):
        batches.set_epoch(number)
        for batch in batches:
            optimizer.zero_grad()
            net(**batch).loss.backward()
            optimizer.step()
    net.eval()


# -- nets --------------------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    """What a classifier gives: logits (B, classes) and, with labels, the mean cross entropy."""

    logits: Tensor
    loss: Tensor | None = None


class Classifier(nn.Module):
    """Takes images x (B, 64) and labels (B); derived classes give logits."""

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Outputs:
        logits = self.logits(x)
        return Outputs(logits, None if labels is None else F.cross_entropy(logits, labels))


class MLP(Classifier):
    """Linear layers ``layers.0`` … with ReLU between them."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class Residual(Classifier):
    """``stem``, square ``blocks.0`` … with h ← h + ½·relu(W h + b), ``head``; widths: (64, d, …, d, 10)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        d = widths[1]
        self.stem, self.head = nn.Linear(widths[0], d), nn.Linear(d, widths[-1])
        self.blocks = nn.ModuleList(nn.Linear(d, d) for _ in widths[2:-1])

    def logits(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        for block in self.blocks:
            h = h + 0.5 * block(h).relu()
        return self.head(h)


class Conv(Classifier):
    """Two 3×3 convolutions ``convs.0`` ``convs.1`` with pooling after each, then ``head``."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        c = widths[1]
        self.convs = nn.ModuleList([nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 2 * c, 3, padding=1)])
        self.head = nn.Linear(8 * c, widths[-1])

    def logits(self, x: Tensor) -> Tensor:
        h = x.reshape(-1, 1, 8, 8)
        for conv in self.convs:
            h = F.max_pool2d(conv(h).relu(), 2)
        return self.head(h.flatten(1))


class ViT(Classifier):
    """transformers' ViT on 2×2 patches, three blocks of four heads; widths: (64, d, 10)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTModel

        d = widths[1]
        shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_hidden_layers": 3, "num_attention_heads": 4}
        self.trunk = ViTModel(ViTConfig(hidden_size=d, intermediate_size=2 * d, **shape), add_pooling_layer=False)
        self.num_heads = shape["num_attention_heads"]  # for methods that go by heads: a bare net has no config to ask
        self.head = nn.Linear(d, widths[-1])

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(pixel_values=x.reshape(-1, 1, 8, 8)).last_hidden_state[:, 0])


NETS = {"mlp": MLP, "residual": Residual, "conv": Conv, "vit": ViT}


# -- changes: images (n, 8, 8) and labels (n) to changed ones ----------------------------------------------------------


def _shuffled(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(7))


CHANGES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "none": lambda x, y: (x, y),
    "rotate": lambda x, y: (torch.rot90(x, 1, (1, 2)), y),
    "transpose": lambda x, y: (x.transpose(1, 2).clone(), y),
    "flip": lambda x, y: (x.flip(2), y),
    "invert": lambda x, y: (1 - x, y),
    "pixels": lambda x, y: (x.reshape(-1, 64)[:, _shuffled(64)].reshape(-1, 8, 8), y),
    "labels": lambda x, y: (x, _shuffled(10)[y]),
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (n, 8, 8), 0 to 1, and their labels (n)."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)


@dataclass(frozen=True)
class Digits(Task):
    """Digits changed one way, or several mixed (``"flip+invert"``: row i gets change i modulo their number).

    Fields: ``net`` and ``widths``; ``change``; ``shots`` training images, ``epochs``, ``batch``; ``noise``, the
    deviation of Gaussian noise on every image; ``pretrained`` False starts from random weights (training from
    scratch, with change "none" and up to 800 shots); ``score`` "accuracy" or "loss"; ``fit_settings``, pairs over
    those of ``fit``.

    Scores: ``test``, ``kept`` (the same on upright test images), ``test_loss``, ``test_accuracy``.
    """

    net: str = "mlp"
    widths: tuple[int, ...] = (64, 256, 256, 10)
    change: str = "rotate"
    shots: int = 200
    epochs: int = 40
    batch: int = 32
    noise: float = 0.0
    pretrained: bool = True
    score: str = "accuracy"
    fit_settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for given, known in [(self.net, NETS), *((c, CHANGES) for c in self.change.split("+"))]:
            if given not in known:
                raise UserError(f"Digits knows no {given!r}; it knows {', '.join(known)}{nearest(given, known)}")
        if self.shots > TRAINED - VALIDATED:
            raise UserError(f"Digits: at most {TRAINED - VALIDATED} shots, {self.shots} were asked for")

    @property
    def higher(self) -> bool:
        """Accuracy is better when higher, a loss is not."""
        return self.score == "accuracy"

    @property
    def words(self) -> str:
        """The task in words."""
        upright = f"upright digits → {self.change}" if self.pretrained else f"digits ({self.change}) from scratch"
        return f"{upright}, {self.net} {'-'.join(map(str, self.widths))}, {self.shots} images, {self.score}"

    @property
    def fit(self) -> dict[str, Any]:
        """As the sheets train: AdamW, constant rate, no clipping, no decay."""
        plain = {"task": "classification", "schedule": "constant", "clip": 0.0, "precision": "fp32"}
        return plain | {"epochs": self.epochs, "batch_size": self.batch} | dict(self.fit_settings)

    def model(self, seed: int) -> nn.Module:
        """A copy of the base of this seed."""
        return copy.deepcopy(_base(self.net, self.widths, self.noise, self.pretrained, seed))

    def rows(self, part: str, seed: int, change: str | None = None) -> dict[str, Tensor]:
        """Columns x (n, 64) and labels (n) of ``"train"``, ``"validation"`` or ``"test"``, changed."""
        order = torch.randperm(TRAINED + TESTED, generator=torch.Generator().manual_seed(seed))
        ends = {"train": (0, self.shots), "validation": (TRAINED - VALIDATED, TRAINED), "test": (TRAINED, None)}
        rows = order[slice(*ends[part])]
        x, y = (t[rows].clone() for t in digits())
        names = (change or self.change).split("+")
        for k, name in enumerate(names):
            x[k :: len(names)], y[k :: len(names)] = CHANGES[name](x[k :: len(names)], y[k :: len(names)])
        return {"x": _noisy(x, self.noise, seed).reshape(len(x), -1), "labels": y}

    def data(self, seed: int) -> Batches:
        """Batches of the changed training images."""
        return Batches(self.rows("train", seed), self.batch, seed)

    def calibration(self, seed: int) -> list[Any]:
        """The first epoch's first four batches."""
        return list(self.data(seed))[:4]

    def validation(self, model: nn.Module, seed: int) -> float:
        """The score on changed images that neither train nor test."""
        return _judged(model, self.rows("validation", seed))[self.score]

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """On the test images, changed and upright."""
        new, old = (_judged(model, self.rows("test", seed, c)) for c in (None, "none"))
        own = {"test": new[self.score], "test_loss": new["loss"], "test_accuracy": new["accuracy"]}
        return own | ({"kept": old[self.score]} if self.pretrained else {})


def _noisy(x: Tensor, deviation: float, seed: int) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) if deviation else x


@cache
def _base(net: str, widths: tuple[int, ...], noise: float, trained: bool, seed: int) -> nn.Module:
    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return NETS[net](widths).eval()

    def train(model: nn.Module) -> None:
        order = torch.randperm(TRAINED + TESTED, generator=torch.Generator().manual_seed(seed))[:TRAINED]
        x, y = (t[order] for t in digits())
        columns = {"x": _noisy(x, noise, seed).reshape(len(x), -1), "labels": y}
        descend(model, Batches(columns, 64, seed), epochs=25, lr=1e-3)

    facts = {"digits": net, "widths": widths, "noise": noise, "seed": seed, "version": 1}
    return pretrained(facts, make, train) if trained else make()


@torch.no_grad()
def _judged(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    was, labels = model.training, rows["labels"]
    found = model.eval()(**rows)
    model.train(was)
    return {"accuracy": float((found.logits.argmax(-1) == labels).float().mean()), "loss": float(found.loss)}
