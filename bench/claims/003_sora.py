"""SoRA (arXiv:2311.11696): gates that a proximal step sets to zero give each site its own rank."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, at_most, every


def components(trial: Trial) -> float:
    """Rank-one components left at all sites."""
    return sum(d.rank for d in trial.adapter.deltas.values())


CLAIM = Claim(
    number=3,
    name="sora",
    claim="With at most 70 % of LoRA's components SoRA ends at a higher accuracy.",
    task=Digits(widths=(64, 128, 128, 128, 10), epochs=60),
    contestants={
        "sora": With("lora+sora(threshold=1e-3)", rank=16, alpha=16, sites="all"),
        "ξ = 5e-4": With("lora+sora(threshold=5e-4)", rank=16, alpha=16, sites="all"),
        "ξ = 2e-3": With("lora+sora(threshold=2e-3)", rank=16, alpha=16, sites="all"),
        "lora": With("lora", rank=16, alpha=16, sites="all"),
        "lora of rank 10": With("lora", rank=10, alpha=10, sites="all"),
    },
    rates=(3e-3, 1e-2, 3e-2),
    seeds=3,
    measures={"components": components},
    rule=every(above("sora", "lora"), at_most("sora", 0.7 * 64, on="components")),
    note="s = 1 in all.",
)

if __name__ == "__main__":
    CLAIM.main()
