"""SLTrain (arXiv:2406.02214): weights that are low-rank and sparse, trained from scratch."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import below

NOISY = Digits(
    widths=(64, 256, 256, 256, 10), change="none", pretrained=False, shots=800, noise=0.6, epochs=20, score="loss"
)
SQUARE = {"sites": ["layers.1", "layers.2"], "train": ["layers.0", "layers.3"], "alpha": 8}


def form(rank: int, density: float) -> With:
    """The two square layers replaced, the others trained densely."""
    return With(f"sltrain(rank={rank}, density={density}, replace=True)", **SQUARE)


CLAIM = Claim(
    number=34,
    name="sltrain",
    claim="Pre-training with random sparse entries beside a low-rank part reaches a lower loss than the low-rank part "
    "alone at the same number of parameters.",
    task=NOISY,
    contestants={
        "rank 4 and 3 % sparse": form(4, 0.03),
        "rank 8 alone": form(8, 1e-6),
        "rank 4 alone": form(4, 1e-6),
        "dense": With("full", sites="linear"),
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2),
    seeds=3,
    rule=below("rank 4 and 3 % sparse", "rank 8 alone"),
    note="A density of 1e-6 leaves no sparse entry. Two square layers of 256 are replaced.",
)

if __name__ == "__main__":
    CLAIM.main()
