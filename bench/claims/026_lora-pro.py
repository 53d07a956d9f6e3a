"""LoRA-Pro (arXiv:2407.18242): steps on A and B that imitate full fine-tuning."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every

LORA = {"rank": 4, "alpha": 8, "sites": "layers.*"}

CLAIM = Claim(
    number=26,
    name="lora-pro",
    claim="At LoRA's parameters LoRA-Pro ends at a lower training loss and a higher accuracy than LoRA.",
    task=Digits(change="rotate", widths=(64, 128, 128, 10), epochs=9),
    contestants={
        "lora-pro": With("lora-pro", **LORA),
        "efficient": With("lora-pro(mode='efficient')", **LORA),
        "lora": With("lora", **LORA),
        "full": With("full", sites="layers.*"),
    },
    rates=(1e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(below("lora-pro", "lora", on="train_loss"), above("lora-pro", "lora")),
    note="63 steps; the sweep reaches down to full fine-tuning's rates, which are LoRA-Pro's too.",
)

if __name__ == "__main__":
    CLAIM.main()
