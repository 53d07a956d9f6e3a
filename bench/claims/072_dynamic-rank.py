"""CoDyRA (arXiv:2412.01004): a task takes the rank it needs, so that a stream of tasks forgets less."""

from bench.claims.harness import Claim, Trial, With
from bench.claims.tasks import Digits
from bench.claims.verdicts import above

SECOND = Digits(change="pixels")
LARGEST = {"dynamic-rank": 0.02, "gates, no threshold": 0.0}


def _stream(trial: Trial, recipe: str) -> None:
    """Rotated digits, then permuted pixels, each learned by an adapter that is then merged."""
    for number, task in enumerate((trial.task, SECOND)):
        adapter = trial.attach(recipe, rank=16, task=task, name=f"task-{number}")
        trial.fit(adapter, task=task)
        trial.kept_rank = sum(d.rank for d in adapter.deltas.values())
        adapter.bake()


def dynamic(trial: Trial) -> None:
    """With the rising threshold."""
    _stream(trial, f"lora+dynamic-rank(largest={LARGEST[trial.label]})")


def plain(trial: Trial) -> None:
    """Sequential LoRA."""
    _stream(trial, "lora")


def second(trial: Trial) -> float:
    """Test accuracy on the second task."""
    return SECOND.scores(trial.model, trial.seed)["test"]


def kept_rank(trial: Trial) -> float:
    """Components of the second task's adapter."""
    return trial.kept_rank


CLAIM = Claim(
    number=72,
    name="dynamic-rank",
    claim="After two tasks in a row the first is remembered better with ranks that fit the task than with sequential "
    "LoRA of full rank.",
    task=Digits(),
    contestants={
        "dynamic-rank": With(function=dynamic),
        "lora": With(function=plain),
        "gates, no threshold": With(function=dynamic),
    },
    rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    seeds=8,
    measures={"second": second, "kept rank": kept_rank},
    rule=above("dynamic-rank", "lora"),
    note="`test` is the first task's accuracy after both, and so is what the rate is chosen by, on validation data; "
    "`second` is the last one's, `kept` that of upright digits.",
)

if __name__ == "__main__":
    CLAIM.main()
