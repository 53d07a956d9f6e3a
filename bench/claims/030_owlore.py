"""OwLore (arXiv:2405.18380): blocks with more outlier weights train more often."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below

STEPS = "galore(rank=16, gap=20, scale=1.0)"

CLAIM = Claim(
    number=30,
    name="owlore",
    claim="Blocks drawn by their share of outliers end at a lower loss than blocks drawn evenly.",
    task=Letters(layers=4, width=32, steps=120),
    contestants={
        "owlore": With(f"owlore(blocks=1, period=5, threshold=5.0)+full(norms=True)+{STEPS}", calibrate=True),
        "even": With(f"owlore(blocks=1, period=5, mode='uniform')+full(norms=True)+{STEPS}", calibrate=True),
        "lisa": "lisa(blocks=1, period=5)",
        "lora": "lora(rank=4)",
    },
    rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=below("owlore", "even"),
    note="M = 5: a net of this size has few weights thirteen times the mean.",
)

if __name__ == "__main__":
    CLAIM.main()
