"""Monarch (arXiv:2204.00595): block-diagonal factors in place of dense weights, trained from scratch."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import below, every

NOISY = Digits(
    widths=(64, 256, 256, 256, 10), change="none", pretrained=False, shots=800, noise=0.6, epochs=20, score="loss"
)
HIDDEN = {"sites": ["layers.1", "layers.2"], "train": ["layers.0", "layers.3", "layers.1.bias", "layers.2.bias"]}

CLAIM = Claim(
    number=53,
    name="monarch",
    claim="Trained from scratch, Monarch matrices with an eighth of the parameters reach the dense network's quality, "
    "which low-rank matrices of that size do not.",
    task=NOISY,
    contestants={
        "monarch": With("monarch(blocks=16, replace=True, start='random')", **HIDDEN),
        "low rank": With("monarch(blocks=1, rank=16, replace=True, start='random')", **HIDDEN),
        "dense": With("full", sites="linear"),
    },
    rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    seeds=5,
    rule=every(below("monarch", "dense", by=-0.05), below("monarch", "low rank")),
    note="The dense quality: a test loss no more than 0.05 above, with 95 % confidence. Two square layers of 256 are "
    "replaced, by 16 × 16 blocks or by one block of rank 16, which is a low-rank matrix of as many numbers.",
)

if __name__ == "__main__":
    CLAIM.main()
