"""LoRA-GGPO and LoRA-MGPO (arXiv:2502.14538): gradients at perturbed weights lead to flat regions."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

LORA = {"rank": 4, "alpha": 8, "sites": "layers.*"}

CLAIM = Claim(
    number=78,
    name="lora-ggpo",
    claim="From few images LoRA-GGPO ends at a higher accuracy and a lower loss on test images than LoRA.",
    task=Digits(change="rotate", widths=(64, 128, 128, 10), shots=60, epochs=75),
    contestants={
        "lora-ggpo": With("lora-ggpo", **LORA),
        "lora-mgpo": With("lora-mgpo", **LORA),
        "lora": With("lora", **LORA),
    },
    rates=(3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(above("lora-ggpo", "lora"), below("lora-ggpo", "lora", on="test_loss")),
)

if __name__ == "__main__":
    CLAIM.main()
