"""SHERL (arXiv:2407.07523): early states, summed without what they repeat, re-enter the last block."""

from bench.claims.harness import Claim, With
from bench.claims.minilm import MiniLM, kept_16x64, share
from bench.claims.texts import Letters
from bench.claims.verdicts import below, every

SHERL, LORA = "sherl", "lora(rank=8)"
ONCE = {"task": MiniLM(), "rates": (1e-3,)}

CLAIM = Claim(
    number=147,
    name="sherl",
    claim="SHERL ends as low as LoRA with about a quarter of its memory for the backward pass.",
    task=Letters(layers=4, steps=150),
    contestants={
        "sherl": SHERL,
        "lora": LORA,
        "lst": "lst(reduction=4)",
        "sherl on minilm": With(SHERL, **ONCE),
        "lora on minilm": With(LORA, **ONCE),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    sweep_seeds=1,
    measures={"kept_16x64": kept_16x64},
    rule=every(share("sherl on minilm", "lora on minilm", 0.35), below("sherl", "lora", by=-0.02)),
    note="As low: no more than 0.02 nats above, with 95 % confidence, on a Llama of four blocks. Bytes are those of "
    "16 rows of 64 tokens, on MiniLM's six blocks.",
)

if __name__ == "__main__":
    CLAIM.main()
