"""N2N (arXiv:1709.06030): the policy learns where adapters pay."""

from statistics import fmean

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

FIELDS = "steps=80, epochs=15"


def late(trial: Trial) -> float:
    """Mean reward of the last five epochs of the second policy."""
    return fmean(r for epoch in _hook(trial).history[-5:] for _, r in epoch)


def best(trial: Trial) -> float:
    """The best reward of all."""
    return max(r for epoch in _hook(trial).history for _, r in epoch)


def _hook(trial: Trial):
    return next(h for h in trial.adapter.hooks if h.name == "n2n")


CLAIM = Claim(
    number=148,
    name="n2n",
    claim="After thirty epochs of trials the policy's rewards are higher than those of one that does not learn.",
    task=Digits(change="labels", widths=(64, 128, 128, 128, 10)),
    contestants={
        "n2n": With(f"lora+n2n({FIELDS})", sites="all", calibrate=True),
        "unlearned": With(f"lora+n2n({FIELDS}, policy_lr=1e-12)", sites="all", calibrate=True),
    },
    rates=(1e-2,),
    seeds=3,
    measures={"late": late, "best": best},
    rule=above("n2n", "unlearned", on="late"),
    note="One rate: the claim is of what is found before training. As many trials for both; trials of the unlearned "
    "policy are random. Trained on three batches of 32 images and scored on a fourth.",
)

if __name__ == "__main__":
    CLAIM.main()
