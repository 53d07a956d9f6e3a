"""CorDA (arXiv:2406.05223): what a context uses most starts to train, or what it uses least."""

import veneer
from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Batches
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every


def keeping(trial: Trial) -> None:
    """CorDA that trains what the base's own tasks use least: it is calibrated on rows of theirs."""
    old = Batches(trial.task.rows("base", trial.seed, old=True), 64, trial.seed)
    batches = [batch for batch, _ in zip(old, range(4))]
    recipe = "lora(rank=4)+corda(mode='kpm')"
    trial.fit(veneer.attach(trial.model, recipe, seed=trial.seed, calibration=batches))


CLAIM = Claim(
    number=93,
    name="corda",
    claim="Calibrated on the task, CorDA learns it faster and better than LoRA and PiSSA do; calibrated on what the "
    "base knows, it forgets less than they do.",
    task=Letters(steps=100),
    contestants={
        "corda": With("lora(rank=4)+corda"),
        "corda, keeping": With(function=keeping),
        "lora": With("lora(rank=4)"),
        "pissa": With("lora(rank=4)+pissa"),
    },
    rates=(1e-3, 3e-3, 1e-2),
    seeds=4,
    rule=every(
        below("corda", "lora"),
        below("corda", "pissa"),
        below("corda, keeping", "lora", on="kept"),
        below("corda, keeping", "pissa", on="kept"),
    ),
    note="Kept: the loss on the base's own tasks after training, each contestant at the rate best for the new one.",
)

if __name__ == "__main__":
    CLAIM.main()
