"""Once-for-All (arXiv:1908.09791): slices of one elastic adapter work without training."""

import torch

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above
from veneer.parts.components import components
from veneer.ranks.elastic import balance, cut

SHARE, RANK = 0.125, 8


def elastic(trial: Trial) -> None:
    """Trained in stages, cut to rank 1."""
    adapter = trial.fit(trial.attach("lora+elastic", rank=RANK))
    trial.whole = _test(trial)
    cut(adapter, dict.fromkeys(adapter.deltas, SHARE))


@torch.no_grad()
def _cut_by_svd(trial: Trial) -> None:
    for c in components(trial.adapter).values():
        for t, value in zip((c.A, c.B), balance(c.A, c.B)):
            t.copy_(value)
        c.prune(range(1))


def truncated(trial: Trial) -> None:
    """LoRA of rank 8, cut to the largest singular direction of each change."""
    trial.fit(trial.attach("lora", rank=RANK))
    trial.whole = _test(trial)
    _cut_by_svd(trial)


def _test(trial: Trial) -> float:
    with torch.no_grad():
        return trial.task.scores(trial.model, trial.seed)["test"]


def whole(trial: Trial) -> float:
    """The test score before the cut."""
    return trial.whole


CLAIM = Claim(
    number=120,
    name="elastic",
    claim="Cut to rank 1 without further training, an elastic adapter of rank 8 is more accurate than a plain one cut "
    "by SVD.",
    task=Digits(),
    contestants={"elastic": With(function=elastic), "svd": With(function=truncated)},
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=8,
    measures={"whole": whole},
    rule=above("elastic", "svd"),
    note="Scores, those on validation data too, are of the cut net; `whole` is the test score before the cut. Both see "
    "the same number of steps; an elastic step runs two slices and the whole as teacher.",
)

if __name__ == "__main__":
    CLAIM.main()
