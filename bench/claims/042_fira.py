"""Fira (arXiv:2410.01623): at GaLore's state, keeping the rest of the gradient trains better."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

SCRATCH = Digits(change="none", pretrained=False, widths=(64, 128, 128, 10), shots=800, epochs=12, batch=64)
SITES = {"sites": "layers.*"}

CLAIM = Claim(
    number=42,
    name="fira",
    claim="At GaLore's rank Fira ends at a lower training loss and a higher accuracy.",
    task=SCRATCH,
    contestants={
        "fira": With("fira(rank=2, gap=50)", **SITES),
        "galore": With("galore(rank=2, gap=50, scale=1.0)", **SITES),
        "lora": With("lora(rank=2, alpha=4)", **SITES),
        "full": With("full", **SITES),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=8,
    rule=every(below("fira", "galore", on="train_loss"), above("fira", "galore")),
)

if __name__ == "__main__":
    CLAIM.main()
