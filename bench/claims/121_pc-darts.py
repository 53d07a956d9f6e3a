"""PC-DARTS (arXiv:1907.05737): with partial channels two searches agree better on the places."""

import torch.nn.functional as F

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above


def _searched(trial: Trial, channels: int) -> None:
    """Two searches with seeds of their own on the same data; then the second one's choice is trained."""
    found = []
    for seed in (0, 1):
        recipe = f"pc-darts(channels={channels})+pc-darts-search(among='all', search=0.6)"
        trial.model = trial.task.model(trial.seed)
        adapter = trial.attach(recipe, seed=10 * trial.seed + seed, sites="all")
        (hook,) = adapter.hooks
        scores = hook.scores  # the tensors that the search moves
        trial.fit(adapter)
        found.append(scores["beta"].detach().softmax(0))
    trial.agreement = float(F.cosine_similarity(found[0], found[1], dim=0))


def quarter(trial: Trial) -> None:
    """K = 4."""
    _searched(trial, 4)


def full(trial: Trial) -> None:
    """K = 1."""
    _searched(trial, 1)


def agreement(trial: Trial) -> float:
    """Cosine between the edge weights of the two searches."""
    return trial.agreement


CLAIM = Claim(
    number=121,
    name="pc-darts",
    claim="Edge weights of two searches with different seeds agree better with a quarter of the "
    "channels than with all.",
    task=Digits(change="pixels", widths=(64, 128, 128, 128, 10), shots=800, epochs=32),
    contestants={"K = 4": With(function=quarter), "K = 1": With(function=full)},
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=4,
    sweep_seeds=1,
    measures={"agreement": agreement},
    rule=above("K = 4", "K = 1", on="agreement"),
    note="800 steps, 480 of them search, whose scores have a rate of their own; the sweep is of the weights' rate.",
)

if __name__ == "__main__":
    CLAIM.main()
