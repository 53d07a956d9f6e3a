"""ABMLL (arXiv:2508.14285): a meta-trained Gaussian start adapts to a new task more accurately and better calibrated.

Tasks are the eight turns and mirrorings of the digits: five to meta-train, one by which rates are chosen, two to test.
On a task the start takes a few steps on 50 labelled images and is judged on others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.harness import Claim, With, nothing
from bench.claims.tasks import TESTED, TRAINED, Digits, Task, digits
from bench.claims.verdicts import above, below, every
from veneer.core.adapter import adapters
from veneer.numerics.calibration import expected_calibration_error
from veneer.objectives.abmll import Episodes
from veneer.parts.state import clone

SUPPORT, INNER = 50, 0.1
TURNS: list[Callable[[Tensor], Tensor]] = [
    lambda x, k=k, m=m: torch.rot90(x.flip(2) if m else x, k, (1, 2)) for m in (False, True) for k in range(4)
]


@dataclass(frozen=True)
class Turns(Task):
    """Few labelled digits of a turn that meta-training has not seen; ``apart`` says which task a row is of."""

    steps: int = 100
    apart: bool = True

    words = "digits in turns not seen before, mlp 64-96-96-10, 5 steps on 50 images, accuracy"

    @property
    def fit(self) -> dict[str, Any]:
        """AdamW, constant rate, gradients clipped to 1 as ABMLL's reviews say."""
        return {"task": "classification", "steps": self.steps, "schedule": "constant", "precision": "fp32"}

    def model(self, seed: int) -> nn.Module:
        """A net trained on upright digits."""
        return Digits(widths=(64, 96, 96, 10)).model(seed)

    def tasks(self, part: str, seed: int) -> list[int]:
        """Numbers of the turns: upright and four others to train, one to validate, two to test."""
        order = (1 + torch.randperm(7, generator=torch.Generator().manual_seed(seed))).tolist()
        return {"train": [0, *order[3:]], "validation": order[2:3], "test": order[:2]}[part]

    def rows(self, task: int, part: str, seed: int) -> dict[str, Tensor]:
        """Columns x (n, 64) and labels (n) of one turn."""
        order = torch.randperm(TRAINED + TESTED, generator=torch.Generator().manual_seed(seed))
        rows = order[:800] if part == "train" else order[800:TRAINED] if part == "validation" else order[TRAINED:]
        x, y = digits()
        return {"x": TURNS[task](x[rows]).reshape(len(rows), -1), "labels": y[rows]}

    def data(self, seed: int) -> Any:
        """Batches of two tasks with 100 rows each."""
        tasks = self.tasks("train", seed)
        parts = [self.rows(t, "train", seed) for t in tasks]
        columns = {name: torch.cat([p[name] for p in parts]) for name in ("x", "labels")}
        found = Episodes(columns, [t for t in tasks for _ in range(800)], 2 * SUPPORT, length=self.steps, seed=seed)
        return found if self.apart else [{k: v for k, v in b.items() if k != "task"} for b in found]

    def validation(self, model: nn.Module, seed: int) -> float:
        """Accuracy after five steps on the task kept for it."""
        return self._judged(model, "validation", seed, 5)["accuracy"]

    def scores(self, model: nn.Module, seed: int) -> dict[str, float]:
        """On the tasks kept for the test, after five steps and after 25."""
        few, more = (self._judged(model, "test", seed, steps) for steps in (5, 25))
        first = {"test": few["accuracy"], "ece": few["ece"], "nll": few["nll"]}
        return first | {f"{name}_25": value for name, value in more.items()}

    def _judged(self, model: nn.Module, part: str, seed: int, steps: int) -> dict[str, float]:
        found = []
        for task in self.tasks(part, seed):
            rows = self.rows(task, part, seed)
            support, query = ({k: v[s] for k, v in rows.items()} for s in (slice(SUPPORT), slice(SUPPORT, None)))
            p, y = adapted(model, support, query, steps), query["labels"]
            nll = -float(p[range(len(y)), y].clamp_min(1e-12).log().mean())
            accuracy = float((p.argmax(1) == y).float().mean())
            found.append({"accuracy": accuracy, "ece": expected_calibration_error(p, y), "nll": nll})
        return {name: sum(f[name] for f in found) / len(found) for name in found[0]}


def adapted(model: nn.Module, support: dict[str, Tensor], query: dict[str, Tensor], steps: int) -> Tensor:
    """Probabilities (n, 10) of the query after some steps on the support; the start stays as it is."""
    adapter = adapters(model)["default"]
    hook = next((h for h in adapter.hooks if hasattr(h, "adapt")), None)
    if hook is not None:
        with adapter.using(hook.adapt(support, steps=steps)):
            return hook.predict(query)
    start = clone(adapter.state())
    with torch.enable_grad():
        for _ in range(steps):
            slopes = torch.autograd.grad(model(**support).loss, adapter.parameters())
            share = 1 / max(1.0, float(torch.stack([s.norm() for s in slopes]).norm()))
            for p, slope in zip(adapter.parameters(), slopes):
                p.data -= INNER * share * slope
    found = model(query["x"]).logits.softmax(-1).detach()
    adapter.load_state(start)
    return found


def untrained(trial: Any) -> None:
    """LoRA as it starts."""
    trial.attach("lora", rank=4)
    nothing(trial)


CLAIM = Claim(
    number=88,
    name="abmll",
    claim="From ABMLL's start a few steps on a new task end more accurate and better calibrated than from LoRA trained "
    "on all tasks together.",
    task=Turns(),
    contestants={
        "abmll": With("abmll", rank=4),
        "lora on all": With("lora", rank=4, task=Turns(apart=False)),
        "lora on all, rank 8": With("lora", rank=8, task=Turns(apart=False)),
        "first-order maml": With("gaussian-lora(log_variance=-70.0)+abmll(beta=0.0, gamma=0.0)", rank=4),
        "lora, not trained": With(function=untrained, rates=(0,)),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    sweep_seeds=1,
    rule=every(above("abmll", "lora on all"), below("abmll", "lora on all", on="ece")),
    note="ABMLL stores as many numbers as LoRA of rank 8. MAML is ABMLL without variance, divergence and prior.",
)

if __name__ == "__main__":
    CLAIM.main()
