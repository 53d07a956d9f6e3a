"""Composable SFT (arXiv:2110.07560): a task's sparse difference and a language's add up to that task in that language.

The "language" is a turned image (learnt with the digits' own labels), the "task" other labels (learnt on upright
images); nobody trains on turned images with other labels, on which the sum is judged.
"""

from typing import Any

import torch

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits, _judged
from bench.claims.verdicts import above, every


class Transfer(Digits):
    """Turned images with other labels, of which nothing is trained on."""

    words = "upright digits → rotate and labels apart, judged on both at once, mlp, 200 images each, accuracy"

    def both(self, part: str, seed: int) -> dict[str, torch.Tensor]:
        """The images of one change with the labels of the other."""
        return {"x": self.rows(part, seed, "rotate")["x"], "labels": self.rows(part, seed, "labels")["labels"]}

    def validation(self, model, seed):
        return _judged(model, self.both("validation", seed))["accuracy"]

    def scores(self, model, seed):
        return {"test": _judged(model, self.both("test", seed))["accuracy"]}


def transfer(trial: Trial) -> None:
    """Train the language and the task apart, each from the base, and have both on."""
    form, language = trial.contestant.attach["form"], trial.contestant.attach.get("language", True)

    def learn(change: str) -> Any:
        task = Digits(change=change)
        return trial.fit(trial.attach(form, task=task, name=change), task=task)

    if not language:
        learn("labels")
        return
    with learn("rotate").disabled():
        learn("labels")


SPARSE = "composable-sft(proportion=0.05, dense=0.5)"
CLAIM = Claim(
    number=140,
    name="composable-sft",
    claim="Sparse differences of a language and a task, added, do that task in that language better than added LoRAs.",
    task=Transfer(),
    contestants={
        "sparse": With(function=transfer, form=SPARSE),
        "sparse, task alone": With(function=transfer, form=SPARSE, language=False),
        "random entries": With(function=transfer, form="composable-sft(proportion=0.05, select='random')"),
        "dense": With(function=transfer, form="composable-sft(proportion=1.0, dense=0.5)"),
        "lora": With(function=transfer, form="lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, 3e-3, 1e-2),
    seeds=3,
    rule=every(above("sparse", "sparse, task alone"), above("sparse", "lora")),
)

if __name__ == "__main__":
    CLAIM.main()
