"""GaLore (arXiv:2403.03507): moments in the gradient's leading directions are enough to train from scratch."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every

SITES = {"sites": "layers.*"}

CLAIM = Claim(
    number=32,
    name="galore",
    claim="From scratch GaLore ends at a higher accuracy than LoRA of its rank, and within a point of full training.",
    task=Digits(change="none", pretrained=False, widths=(64, 128, 128, 10), shots=800, epochs=12, batch=64),
    contestants={
        "galore": With("galore(rank=8, gap=50, scale=1.0)", **SITES),
        "8 bits": With("galore(rank=8, gap=50, scale=1.0, bits=8)", **SITES),
        "lora": With("lora(rank=8, alpha=16)", **SITES),
        "full": With("full", **SITES),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=8,
    rule=every(above("galore", "lora"), above("galore", "full", by=-0.01)),
    note="The moments of a 128 × 128 matrix are 2,048 numbers beside 32,768, and its subspace 1,024.",
)

if __name__ == "__main__":
    CLAIM.main()
