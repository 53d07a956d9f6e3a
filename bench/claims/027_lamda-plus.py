"""LaMDA++ (arXiv:2406.12832): more rank where the leading singular values hold less of W."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=27,
    name="lamda-plus",
    claim="LaMDA++ ends at a higher accuracy than LaMDA of the same mean rank.",
    task=Digits(net="residual", widths=(64, 96, 96, 96, 96, 96, 96, 96, 10), epochs=30),
    contestants={"lamda++": With("lamda++", rank=8), "lamda": With("lamda", rank=8), "lora": With("lora", rank=8)},
    rates=(1e-3, 3e-3, 1e-2, 3e-2),
    seeds=5,
    rule=above("lamda++", "lamda"),
    note="The rule that gives ranks is ours: the paper's own is in no code.",
)

if __name__ == "__main__":
    CLAIM.main()
