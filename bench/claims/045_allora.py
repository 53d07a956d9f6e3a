"""ALLoRA (arXiv:2410.09692): rows of the update that are still small learn faster."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

LORA = {"rank": 4, "alpha": 4, "sites": "layers.*"}

CLAIM = Claim(
    number=45,
    name="allora",
    claim="With s = 1 and no dropout ALLoRA ends at a higher accuracy than LoRA.",
    task=Digits(change="rotate", widths=(64, 128, 128, 10), epochs=9),
    contestants={
        "allora": With("allora", **LORA),
        "on the update": With("allora(mode='update')", **LORA),
        "η² = 4": With("allora(eta_squared=4.0)", **LORA),
        "lora": With("lora", **LORA),
        "dora": With("dora", **LORA),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=above("allora", "lora"),
    note="63 steps of AdamW, whose steps hardly feel a factor on the gradient.",
)

if __name__ == "__main__":
    CLAIM.main()
