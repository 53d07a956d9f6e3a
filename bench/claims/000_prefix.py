"""Prefix tuning (arXiv:2101.00190): keys and values of its own in every layer say more than soft words at the input."""

from bench.claims.harness import Claim, With
from bench.claims.texts import Letters
from bench.claims.verdicts import below

CLAIM = Claim(
    number=0,
    name="prefix",
    claim="A prefix in every layer ends lower than as many soft tokens at the input alone.",
    task=Letters(),
    contestants={
        "prefix": With("prefix(length=10)"),
        "prompt": With("prompt(length=10)"),
        "lora": With("lora(rank=4)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    seeds=3,
    sweep_seeds=1,
    rule=below("prefix", "prompt"),
)

if __name__ == "__main__":
    CLAIM.main()
