"""OLoRA (arXiv:2406.01775): an orthonormal start, taken from W, in place of noise and zeros."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

CLAIM = Claim(
    number=0,
    name="olora",
    claim="At equal rank and steps OLoRA converges faster than LoRA and ends lower.",
    task=Letters(steps=100),
    contestants={"olora": With("lora(rank=4)+olora"), "lora": With("lora(rank=4)")},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=every(below("olora", "lora"), below("olora", "lora", on="train_loss")),
)

if __name__ == "__main__":
    CLAIM.main()
