"""IncreLoRA (arXiv:2308.12043): ranks that grow where they are missed."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=61,
    name="increlora",
    claim="At an equal number of components IncreLoRA ends at a higher accuracy than LoRA of one rank everywhere.",
    task=Digits(widths=(64, 128, 128, 128, 10), change="pixels"),
    contestants={
        "increlora": With("increlora(alpha=16)+increlora-ranks(rank=3, block=1)", sites="all"),
        "lora": With("lora", rank=3, alpha=16, sites="all"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=8,
    rule=above("increlora", "lora"),
    note="α = 16 in both, so that s is the same where the ranks are.",
)

if __name__ == "__main__":
    CLAIM.main()
