"""EVA (arXiv:2410.07170): A starts at the directions of the inputs, and ranks go where these explain most."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

CLAIM = Claim(
    number=64,
    name="eva",
    claim="At an equal sum of ranks EVA converges faster than LoRA and ends lower.",
    task=Letters(steps=100),
    contestants={
        "eva": With("lora(rank=4)+eva"),
        "lora": With("lora(rank=4)"),
        "eva, even ranks": With("lora(rank=4)+eva(rho=1.0)"),
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=4,
    rule=every(below("eva", "lora"), below("eva", "lora", on="train_loss")),
)

if __name__ == "__main__":
    CLAIM.main()
