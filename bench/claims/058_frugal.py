"""FRUGAL (arXiv:2411.07837): with signs where there is no state, a small share of state trains better than GaLore."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

SCRATCH = Digits(change="none", pretrained=False, widths=(64, 128, 128, 10), shots=800, epochs=12, batch=64)
SITES = {"sites": "layers.*"}

CLAIM = Claim(
    number=58,
    name="frugal",
    claim="At GaLore's state FRUGAL ends at a lower training loss and a higher accuracy.",
    task=SCRATCH,
    contestants={
        "frugal": With("frugal(part='svd', share=0.019, gap=50)", **SITES),
        "galore": With("galore(rank=2, gap=50, scale=1.0)", **SITES),
        "lora": With("lora(rank=2, alpha=4)", **SITES),
        "full": With("full", **SITES),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(below("frugal", "galore", on="train_loss"), above("frugal", "galore")),
    note="A share of 0.019 is a rank of 1 on the first matrix and of 2 on the second: at most GaLore's state.",
)

if __name__ == "__main__":
    CLAIM.main()
