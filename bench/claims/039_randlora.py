"""RandLoRA (arXiv:2502.00987): a full-rank change from frozen random bases with trained scales."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=39,
    name="randlora",
    claim="At LoRA's number of parameters the full-rank change of RandLoRA ends at a higher accuracy.",
    task=Digits(),
    contestants={
        "randlora": With("randlora(rank=8)"),
        "lora": With("lora(rank=8, alpha=16)"),
        "vera": With("vera(rank=256)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("randlora", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
