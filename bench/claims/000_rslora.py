"""rsLoRA (arXiv:2312.03732): a scale of α/√r in place of α/r."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

RATE = 3e-3  # LoRA's usual one on this task

CLAIM = Claim(
    number=0,
    name="rslora",
    claim="At one α and one rate a scale of α/√r makes a high rank learn more than α/r does.",
    task=Digits(),
    contestants={
        "rslora": With("rslora(rank=16, alpha=8)"),
        "lora": With("lora(rank=16, alpha=8)"),
        "lora of rank 4": With("lora(rank=4, alpha=8)"),
    },
    rates=(1e-3, RATE, 1e-2, 3e-2),
    seeds=5,
    rule=above("rslora", "lora", rate=RATE),
    note="Judged at one rate, as the claim is; the table holds each one's best rate too, where the gap may close.",
)

if __name__ == "__main__":
    CLAIM.main()
