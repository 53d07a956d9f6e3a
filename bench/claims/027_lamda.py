"""LaMDA (arXiv:2406.12832): a small core between projections that are frozen, one at once and one by and by."""

from bench.claims.harness import Claim, Trial, With, kept_bytes
from bench.claims.tasks import Digits
from bench.claims.verdicts import above, below, every


def updates(trial: Trial) -> float:
    """Numbers that train in a step, a mean over the run: LaMDA's B is frozen evenly over the first 30 % of it."""
    share = 0.15 if any(h.name == "lamda-freezing" for h in trial.adapter.hooks) else 1.0
    return sum(p.numel() * (share if n.endswith(".B") else 1) for n, p in trial.adapter.named_parameters())


CLAIM = Claim(
    number=27,
    name="lamda",
    claim="LaMDA is as accurate as LoRA, trains fewer numbers a step and keeps fewer bytes for the backward pass.",
    task=Digits(net="vit", widths=(64, 48, 10), epochs=20),
    contestants={"lamda": With("lamda(rank=8)"), "lora": With("lora(rank=4, alpha=8)")},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=3,
    measures={"kept_bytes": kept_bytes, "updates": updates},
    rule=every(
        above("lamda", "lora", by=-0.02),
        below("lamda", "lora", on="updates"),
        below("lamda", "lora", on="kept_bytes"),
    ),
    note="As accurate: no more than two points below, with 95 % confidence. S learns at ten times the rate of B. A "
    "first trial was on the MLP 64-256-256-10, 40 epochs, 5 seeds: 0.802 ± 0.019 against 0.885 ± 0.019, with 13 % more "
    "bytes kept, as a ReLU keeps the next layer's input whoever asks for it.",
)

if __name__ == "__main__":
    CLAIM.main()
