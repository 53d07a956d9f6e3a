"""BitFit (arXiv:2106.10199): biases alone, where the whole input is turned."""

from bench.claims.harness import Claim, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

CLAIM = Claim(
    number=0,
    name="bitfit",
    claim="Training biases alone is competitive with changes of the weights.",
    task=Digits(),
    contestants={
        "bitfit": With("bitfit", sites="linear"),
        "lora of rank 1": With("lora(rank=1, alpha=2)"),
        "lora": With("lora(rank=4, alpha=8)"),
    },
    rates=(3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    seeds=5,
    rule=above("bitfit", "lora", by=-0.02),
    note="The paper's tasks are near to the base's; a turned image is not, and no shift of features turns it back.",
)

if __name__ == "__main__":
    CLAIM.main()
