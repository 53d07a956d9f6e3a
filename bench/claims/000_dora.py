"""DoRA (arXiv:2402.09353): direction and length of W's rows change apart."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="dora",
    claim="DoRA ends at a higher accuracy than LoRA of the same rank.",
    task=Digits(),
    contestants={"dora": With("dora(rank=4, alpha=8)"), "lora": With("lora(rank=4, alpha=8)")},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("dora", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
