"""TriAdaptLoRA (arXiv:2501.08008): ranks that grow where the core rises fastest."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=10,
    name="triadaptlora",
    claim="At an equal number of components TriAdaptLoRA ends at a higher accuracy than LoRA of one rank everywhere.",
    task=Digits(widths=(64, 128, 128, 128, 10), change="pixels"),
    contestants={
        "triadaptlora": With(
            "triadaptlora(alpha=16)+triadaptlora-ranks(rank=3, block=1)+orthogonal(weight=0.1)", sites="all"
        ),
        "lora": With("lora", rank=3, alpha=16, sites="all"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=4,
    rule=above("triadaptlora", "lora"),
    note="α = 16 in both, so that s is the same where the ranks are.",
)

if __name__ == "__main__":
    CLAIM.main()
