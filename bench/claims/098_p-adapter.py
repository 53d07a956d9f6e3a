"""p-Adapter (arXiv:2312.10613): behind an attention, messages are weighed by how far features lie apart."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, every


def moved(trial: Trial) -> float:
    """How far p has moved from its start, the largest over the blocks."""
    exponents = [d for d in trial.adapter.deltas.values() if "p" in d._parameters]
    return max((abs(float(d.p) - d.exponent) for d in exponents), default=0.0)


CLAIM = Claim(
    number=98,
    name="p-adapter",
    claim="With p learned a p-Adapter is more accurate than with plain averages, a bottleneck adapter and LoRA.",
    task=Digits(net="vit", widths=(64, 48, 10), epochs=12),
    contestants={
        "p-adapter": With("p-adapter(reduction=4)"),
        "averages": With("p-adapter(reduction=4, exponent=2.0, learn=False)"),
        "adapter": With("adapter(placement='houlsby', rank=9)"),
        "lora": With("lora(rank=3)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    measures={"moved": moved},
    rule=every(above("p-adapter", "averages"), above("p-adapter", "adapter"), above("p-adapter", "lora")),
    note="Self-attention over patches; the paper's gain is in the cross-attention of vision–language models, which no "
    "model of this size has. The adapter of width 9 has as many parameters, LoRA of rank 3 a tenth more.",
)

if __name__ == "__main__":
    CLAIM.main()
