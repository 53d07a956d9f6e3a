"""StructuredLoRA (arXiv:2502.14482): a small trained matrix between A and B."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below

CLAIM = Claim(
    number=9,
    name="slora",
    claim="At equal rank StructuredLoRA ends lower than LoRA.",
    task=Letters(steps=100),
    contestants={"slora": With("slora(rank=4)"), "lora": With("lora(rank=4)")},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=below("slora", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
