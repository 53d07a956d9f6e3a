"""AdaLoRA (arXiv:2303.10512): rank where it matters, at the budget of one rank everywhere."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

RECIPE = "lora(alpha=16)+adalora(rank=3, initial=8, interval=5)+orthogonal(weight=0.1)"

CLAIM = Claim(
    number=61,
    name="adalora",
    claim="At an equal number of components AdaLoRA ends at a higher accuracy than LoRA of one rank everywhere.",
    task=Digits(widths=(64, 128, 128, 128, 10), change="pixels"),
    contestants={
        "adalora": With(RECIPE, sites="all"),
        "lora": With("lora", rank=3, alpha=6, sites="all"),
        "adalora from eva's start": With(RECIPE.replace("+adalora", "+eva+adalora"), sites="all"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=5,
    rule=above("adalora", "lora"),
    note="Both have s = 2; AdaLoRA's pairs begin at rank 8.",
)

if __name__ == "__main__":
    CLAIM.main()
