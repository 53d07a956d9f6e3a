"""GLAD (arXiv:2507.13089): the gradient at a perturbed point steers few-shot training."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

LORA = {"rank": 4, "alpha": 8, "sites": "layers.*"}

CLAIM = Claim(
    number=83,
    name="glad",
    claim="From few images GLAD ends at a higher accuracy and a lower loss on test images than LoRA.",
    task=Digits(change="rotate", widths=(64, 128, 128, 10), shots=60, epochs=75),
    contestants={
        "glad": With("glad(rho=0.1)", **LORA),
        "project": With("glad(rho=0.1, mode='project')", **LORA),
        "sam": With("glad(share=1.0)", **LORA),
        "lora": With("lora", **LORA),
    },
    rates=(3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(above("glad", "lora"), below("glad", "lora", on="test_loss")),
    note="The authors' rule is not public: `glad` is the mean of both gradients.",
)

if __name__ == "__main__":
    CLAIM.main()
