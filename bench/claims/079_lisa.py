"""LISA (arXiv:2403.17919): a few random blocks at a time, all of their weights."""

from bench.claims.harness import Claim
from bench.claims.texts import Letters
from bench.claims.verdicts import below

CLAIM = Claim(
    number=79,
    name="lisa",
    claim="At the same number of steps LISA ends at a lower loss than LoRA.",
    task=Letters(layers=4, width=32, steps=120),
    contestants={
        "lisa": "lisa(blocks=1, period=5)",
        "lora": "lora(rank=4)",
        "full": "full(norms=True)",
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    rule=below("lisa", "lora"),
    note="One block of four trains at a time, and embedding, head and last norm always.",
)

if __name__ == "__main__":
    CLAIM.main()
