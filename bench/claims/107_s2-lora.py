"""S2-LoRA (arXiv:2309.11756): one pair of factors for all layers, and sparse coefficients for each."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

DEEP = Digits(net="residual", widths=(64, *[128] * 7, 10), epochs=30)
SITES = {"sites": "blocks.*"}


def components(trial: Trial) -> float:
    """Components that are left, over all layers."""
    own = trial.adapter.deltas.values()
    return sum(int(d.c.count_nonzero()) if hasattr(d, "c") else d.rank for d in own)


CLAIM = Claim(
    number=107,
    name="s2-lora",
    claim="At LoRA's number of parameters a pair that all layers share, weighed by each, gives a higher accuracy.",
    task=DEEP,
    contestants={
        "s2-lora": With("s2-lora(rank=12, alpha=24)", **SITES),
        "s2-lora, pruned": With("s2-lora(rank=12, alpha=24, penalty=0.0, shrink=1.0)", **SITES),
        "lora": With("lora(rank=2, alpha=4)", **SITES),
    },
    rates=(2e-3, 5e-3, 1e-2, 2e-2),
    seeds=5,
    measures={"components": components},
    rule=above("s2-lora", "lora"),
)

if __name__ == "__main__":
    CLAIM.main()
