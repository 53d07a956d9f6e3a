"""DyLoRA (arXiv:2210.07558): one run, and any rank up to the trained one."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every
from veneer.ranks.dylora import at_rank


def at_one(trial: Trial) -> float:
    """Test accuracy with the first component of every site."""
    with at_rank(trial.adapter, 1):
        return trial.task.scores(trial.model, trial.seed)["test"]


def at_two(trial: Trial) -> float:
    """With the first two."""
    with at_rank(trial.adapter, 2):
        return trial.task.scores(trial.model, trial.seed)["test"]


def at_four(trial: Trial) -> float:
    """With the first four."""
    with at_rank(trial.adapter, 4):
        return trial.task.scores(trial.model, trial.seed)["test"]


CLAIM = Claim(
    number=24,
    name="dylora",
    claim="Cut to any lower rank DyLoRA keeps far more accuracy than LoRA does, and at full rank it is as accurate to "
    "within four points.",
    task=Digits(),
    contestants={
        "dylora": With("dylora", rank=8, alpha=16),
        "lora": With("lora", rank=8, alpha=16),
        "frozen variant": With("dylora(frozen=True)", rank=8, alpha=16),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    measures={"rank 1": at_one, "rank 2": at_two, "rank 4": at_four},
    rule=every(
        above("dylora", "lora", on="rank 1"),
        above("dylora", "lora", on="rank 2"),
        above("dylora", "lora", on="rank 4"),
        above("dylora", "lora", by=-0.04),
    ),
    note="LoRA is cut as DyLoRA is: its first components, at the scale α/n. Rates are chosen at full rank.",
)

if __name__ == "__main__":
    CLAIM.main()
