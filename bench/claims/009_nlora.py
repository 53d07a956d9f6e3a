"""NLoRA (arXiv:2502.14482): the three factors of StructuredLoRA start at blocks of W."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

CLAIM = Claim(
    number=9,
    name="nlora",
    claim="NLoRA ends lower than LoRA and than StructuredLoRA of the same rank.",
    task=Letters(steps=100),
    contestants={
        "nlora": With("slora(rank=4)+nlora"),
        "slora": With("slora(rank=4)"),
        "lora": With("lora(rank=4)"),
        "nlora as published": With("slora(rank=4)+nlora(residual=False)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=every(below("nlora", "lora"), below("nlora", "slora")),
    note="As published it starts off the base; by default what the factors start at is subtracted.",
)

if __name__ == "__main__":
    CLAIM.main()
