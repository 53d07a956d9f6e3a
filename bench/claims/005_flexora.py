"""Flexora (arXiv:2408.10774): adapt the blocks that a validation loss asks for."""

import random

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

SEARCH = "flexora(steps=200, lr=0.005, batches=2, keep=4)"


def chosen(trial: Trial) -> None:
    """LoRA on the four blocks that the search found."""
    batches = list(trial.task.data(trial.seed))
    trial.fit(trial.attach(f"lora+{SEARCH}", rank=2, sites="blocks.*", calibration=batches))


def random_four(trial: Trial) -> None:
    """LoRA on four random blocks."""
    places = random.Random(trial.seed).sample(range(8), 4)
    trial.fit(trial.attach("lora", rank=2, sites=[f"blocks.{i}" for i in sorted(places)]))


def every_block(trial: Trial) -> None:
    """LoRA on all eight."""
    trial.fit(trial.attach("lora", rank=2, sites="blocks.*"))


CLAIM = Claim(
    number=5,
    name="flexora",
    claim="LoRA on the half of the blocks that Flexora chooses ends at a higher accuracy than on a random half.",
    task=Digits(net="residual", widths=(64, *[64] * 9, 10), change="pixels"),
    contestants={
        "flexora": With(function=chosen),
        "four random blocks": With(function=random_four),
        "all blocks": With(function=every_block),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("flexora", "four random blocks"),
    note="The search sees the training images alone, half of them held out; its steps are not counted.",
)

if __name__ == "__main__":
    CLAIM.main()
