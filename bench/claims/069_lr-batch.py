"""Learning rate and batch size (arXiv:2006.09092): Adam's best rate grows with the root of the batch."""

from bench.claims.harness import Claim, Results, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import Finding, above

LORA = {"rank": 4, "alpha": 8, "sites": "layers.*"}
LARGE = Digits(widths=(64, 128, 128, 10), shots=512, batch=128, epochs=20)


def carried(results: Results) -> Finding:
    """At the rate that is best for 8 rows."""
    return above("lr-batch", "as it is", rate=results.chosen["8 rows"])(results)


CLAIM = Claim(
    number=69,
    name="lr-batch",
    claim="A rate found at 8 rows a step and scaled by √(B/8) serves 128 rows better than as it is.",
    task=Digits(widths=(64, 128, 128, 10), shots=512, batch=8, epochs=5),
    contestants={
        "8 rows": With("lora", **LORA),
        "lr-batch": With("lora+lr-batch(reference=8)", task=LARGE, **LORA),
        "as it is": With("lora", task=LARGE, **LORA),
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=3,
    rule=carried,
    note="320 steps of 8 rows, 80 of 128.",
)

if __name__ == "__main__":
    CLAIM.main()
