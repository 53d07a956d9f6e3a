"""DSCLoRA (arXiv:2504.11271): low-rank convolutions and a larger teacher raise a small network's PSNR at no cost."""

import veneer
from bench.claims.harness import Claim, Trial, With, nothing
from bench.claims.photographs import Enlarging
from bench.claims.verdicts import above, every


def taught(trial: Trial) -> None:
    """ConvLoRA with the teacher's image and affinities."""
    learn(trial, "conv-lora(rank=2)+dsclora(pool=2)")


def heavy(trial: Trial) -> None:
    """The same with as much weight on the affinities as on the image."""
    learn(trial, "conv-lora(rank=2)+dsclora(pool=2, affinity=1.0)")


def shown(trial: Trial) -> None:
    """ConvLoRA with the teacher's image alone."""
    learn(trial, "conv-lora(rank=2)+dsclora(affinity=0.0)")


def learn(trial: Trial, recipe: str) -> None:
    """Train by a recipe that has a teacher."""
    adapter = veneer.attach(trial.model, recipe, seed=trial.seed)
    adapter.hooks[-1].guided_by(trial.task.teacher())
    run = veneer.fit(
        adapter, trial.task.data(trial.seed), lr=trial.lr, display=False, **trial.task.fit, seed=trial.seed
    )
    trial.adapter, trial.losses, trial.seconds = adapter, run.losses, run.record["seconds"]


CLAIM = Claim(
    number=8,
    name="dsclora",
    claim="Low-rank convolutions trained with a teacher's images and feature affinities raise the PSNR of a small "
    "network that stays as fast as it was.",
    task=Enlarging(),
    contestants={
        "dsclora": With(function=taught),
        "affinities at weight 1": With(function=heavy),
        "teacher's image": With(function=shown),
        "conv-lora": With("conv-lora", rank=2),
        "lora": With("lora", rank=4, alpha=8, sites="conv"),
        "full": With("full", sites="conv"),
        "base": With(function=nothing, rates=(0,)),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    sweep_seeds=1,
    rule=every(above("dsclora", "base"), above("dsclora", "conv-lora")),
    note="The second part asks whether the gain is the teacher's: any training goes on from where the base stopped.",
)

if __name__ == "__main__":
    CLAIM.main()
