"""LST (arXiv:2206.06522): a thin network beside the trunk learns without a backward pass through it."""

from bench.claims.harness import Claim, With
from bench.claims.minilm import MiniLM, kept_16x64, share
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

LST, LORA = "lst(reduction=4)", "lora(rank=8)"
ONCE = {"task": MiniLM(), "rates": (1e-3,)}

CLAIM = Claim(
    number=126,
    name="lst",
    claim="LST ends as low as LoRA with about half of its memory for the backward pass.",
    task=Letters(layers=4, steps=150),
    contestants={
        "lst": LST,
        "lora": LORA,
        "lst on minilm": With(LST, **ONCE),
        "lora on minilm": With(LORA, **ONCE),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    sweep_seeds=1,
    measures={"kept_16x64": kept_16x64},
    rule=every(share("lst on minilm", "lora on minilm", 0.55), below("lst", "lora", by=-0.02)),
    note="As low: no more than 0.02 nats above, with 95 % confidence, on a Llama of four blocks. Bytes are those of "
    "16 rows of 64 tokens, on MiniLM: all twelve heads stay in the side network, so that its attention maps are as "
    "large as the trunk's. The paper's 31 % of full fine-tuning is of wider models.",
)

if __name__ == "__main__":
    CLAIM.main()
