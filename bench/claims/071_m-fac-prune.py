"""M-FAC (arXiv:2107.03356): weights are dropped by curvature, and the others make up for them."""

import torch

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above
from veneer.optim.m_fac import prune

SPARSITY, GRADIENTS, ROWS = 0.8, 128, 8


def _weights(trial: Trial) -> list[torch.nn.Parameter]:
    return [layer.weight for layer in trial.model.layers]


def surgery(trial: Trial) -> None:
    """Optimal brain surgery in as many rounds as the label says, one block."""
    rows, batches = trial.task.rows("train", trial.seed), []
    for k in range(GRADIENTS):
        batches.append({name: column[k * ROWS % 800 :][:ROWS] for name, column in rows.items()})
    rounds = int(trial.label.split()[-2]) if trial.label != "m-fac" else 8
    prune(trial.model, _weights(trial), batches, SPARSITY, rounds=rounds, block=None)


@torch.no_grad()
def magnitude(trial: Trial) -> None:
    """The smallest weights of all."""
    weights = _weights(trial)
    limit = torch.cat([w.abs().flatten() for w in weights]).quantile(SPARSITY)
    for w in weights:
        w[w.abs() <= limit] = 0


CLAIM = Claim(
    number=71,
    name="m-fac-prune",
    claim="At 80 % sparsity, without training on, pruning by M-FAC leaves a higher accuracy than by magnitude.",
    task=Digits(change="none", widths=(64, 32, 32, 10), shots=800),
    contestants={
        "m-fac": With(function=surgery, rates=(0,)),
        "m-fac in 1 round": With(function=surgery, rates=(0,)),
        "magnitude": With(function=magnitude, rates=(0,)),
    },
    seeds=5,
    rule=above("m-fac", "magnitude"),
    note=f"Upright digits, the net trained on them; {GRADIENTS} gradients of {ROWS} rows; `m-fac` is in 8 rounds. "
    "No rate: nothing is trained.",
)

if __name__ == "__main__":
    CLAIM.main()
