"""SLTrain (arXiv:2406.02214): weights that are low-rank and sparse, trained from scratch."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Words
from bench.claims.verdicts import below

DENSE = {"train": ["model.embed_tokens", "*norm*", "lm_head"]}  # beside the layers of the blocks


def form(rank: int, density: float) -> With:
    """All linear layers of the blocks replaced, at scale 2."""
    return With(f"sltrain(rank={rank}, alpha={2 * rank}, density={density}, replace=True)", **DENSE)


CLAIM = Claim(
    number=34,
    name="sltrain",
    claim="Pre-training with random sparse entries beside a low-rank part reaches a lower loss than the low-rank part "
    "alone at the same number of parameters.",
    task=Words(steps=300),
    contestants={
        "rank 6 and 5 % sparse": form(6, 0.053),
        "rank 8 alone": form(8, 1e-6),
        "rank 6 alone": form(6, 1e-6),
        "dense": With("full", **DENSE),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    sweep_seeds=1,
    rule=below("rank 6 and 5 % sparse", "rank 8 alone"),
    note="A density of 1e-6 leaves no sparse entry.",
)

if __name__ == "__main__":
    CLAIM.main()
