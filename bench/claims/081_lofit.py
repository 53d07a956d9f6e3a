"""LoFiT (arXiv:2406.01563): offsets on a few attention heads, chosen by first scaling all of them."""

import math
import random
from collections.abc import Callable

from bench.claims.harness import Claim, Trial, With
from bench.claims.texts import LETTERS, Letters
from bench.claims.verdicts import below, every, once_learned

HEADS = 4  # of sixteen


def by(order: Callable[[list, int], list]) -> Callable[[Trial], None]:
    """LoFiT with the heads in another order of merit."""

    def train(trial: Trial) -> None:
        adapter = trial.attach(f"lofit+lofit-selection(keep={HEADS})")
        (selection,) = adapter.hooks
        ranked = selection.scores
        selection.scores = lambda: order(ranked(), trial.seed)
        trial.fit(adapter)

    return train


CLAIM = Claim(
    number=81,
    name="lofit",
    claim="Offsets on the attention heads whose scales grew most adapt a model better than on random heads.",
    task=Letters(layers=4, steps=300),
    contestants={
        "chosen heads": f"lofit+lofit-selection(keep={HEADS})",
        "random heads": With(function=by(lambda found, seed: random.Random(seed).sample(found, len(found)))),
        "lowest heads": With(function=by(lambda found, seed: found[::-1])),
        "lora": With("lora(rank=1)"),
    },
    rates=(1e-2, 3e-2, 1e-1),
    seeds=3,
    sweep_seeds=1,
    # which heads are better says something only where offsets on them learn the task at all
    rule=once_learned(
        "chosen heads",
        math.log(LETTERS),
        every(below("chosen heads", "random heads"), below("chosen heads", "lowest heads")),
    ),
    note="An offset is added whatever the input; a model of this size has nothing stored that an offset could call up.",
)

if __name__ == "__main__":
    CLAIM.main()
