"""What `veneer plan` foretells against what a run then takes: peak anonymous memory and step time, recipe by recipe.

SmolLM2-135M in bf16. The forecasts are made one after the other in one process, as the command makes them; every run
has a process of its own. A run is `veneer.fit` over random tokens of the planned shape; its step time is the median of
its steps but the first, its memory the peak that the loop records.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import Figure, Report, figure, fresh, main, parser, say
from bench.pieces import can_add, earlier

if TYPE_CHECKING:
    from veneer.analysis.plan import Job

MODEL = "smollm2-135m"
ROWS, LENGTH = 8, 128
MEMORY, TIME = 0.15, 0.25  # how far a forecast may be off
STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "lora, rank 16": {"recipe": "lora", "rank": 16},
    "lora, rank 64": {"recipe": "lora", "rank": 64},
    "lora, rank 16, checkpointing": {"recipe": "lora", "rank": 16, "checkpointing": True},
    "lora, rank 16, 4 rows of 768": {"recipe": "lora", "rank": 16, "rows": 4, "length": 768},
    "dora, rank 16": {"recipe": "dora", "rank": 16},
    "full": {"recipe": "full"},
    "lora+nf4, rank 16": {"recipe": "lora+nf4", "rank": 16},
    "galore": {"recipe": "galore(rank=128, svd='randomized')"},
    "lisa": {"recipe": "full+lisa(blocks=2, period=2)"},
    "lst": {"recipe": "lst"},
    "bitfit": {"recipe": "bitfit"},
    "vera": {"recipe": "vera"},
    "adapter": {"recipe": "adapter"},
}


def job(name: str, quick: bool) -> Job:
    """The case's job; small when quick."""
    from veneer.analysis.plan import Job

    given = {"rows": ROWS, "length": LENGTH} | CASES[name]
    return Job(**given | ({"rows": 4, "length": 16} if quick else {}))


def measure(options: argparse.Namespace) -> Report:
    """Forecast and run of every case, and how far apart they are."""
    quick, cases = ["--quick"] if options.quick else [], options.only or list(CASES)
    settings = {"model": MODEL, "dtype": "bfloat16", "steps": STEPS, "jobs": CASES, "quick": options.quick}
    samples = earlier("plan", settings) if options.add else {}
    say("forecasts …")
    expected = fresh("bench.plan", *quick, "--forecast", *cases)
    for name in cases:
        say(f"{name} …")
        samples[name] = {"forecast": expected[name], "run": fresh("bench.plan", *quick, "--run", name)}
    samples = {name: samples[name] for name in CASES if name in samples}
    return Report([f for name, sample in samples.items() for f in figures(name, sample)], samples, settings)


def figures(name: str, sample: dict[str, Any]) -> list[Figure]:
    """How far memory and time of a case are off, as fractions of what was measured."""
    found = []
    for what, unit, size, most in (("memory", "MiB", 2**20, MEMORY), ("step", "s", 1.0, TIME)):
        said, seen = sample["forecast"][what] / size, sample["run"][what] / size
        note = f"foretold {said:.4g}, measured {seen:.4g} {unit}, ratio {said / seen:.3f}"
        found.append(figure(f"{name}: {what} off by", abs(said / seen - 1), at_most=most, note=note))
    return found


def forecasts(names: list[str], quick: bool) -> dict[str, Any]:
    """The forecasts of some cases, made one after the other in this process."""
    import veneer
    from veneer.analysis.plan import Planner

    planner = Planner(lambda: veneer.load_model(MODEL)[0])
    return {name: asdict(planner.forecast(job(name, quick))) for name in names}


def run(name: str, quick: bool) -> dict[str, Any]:
    """Peak bytes and seconds a step of the case's own run, in this process."""
    import veneer
    from veneer.analysis.plan import Clock
    from veneer.analysis.samples import at_random

    planned, clock = job(name, quick), Clock()
    model, _ = veneer.load_model(MODEL)
    source = at_random(model, "causal", planned.rows, planned.length)
    adapter = veneer.attach(model, planned.recipe, rank=planned.rank, calibration=source.make(2, 4))
    rows = source.make(planned.rows, STEPS)
    done = veneer.fit(adapter, rows, steps=STEPS, lr=1e-6, display=clock, checkpointing=planned.checkpointing)
    return {"memory": done.record["peak_memory"], "step": statistics.median(clock.steps()[1:])}


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help="some of the cases")
    can_add(made)
    made.add_argument("--forecast", nargs="+", help=argparse.SUPPRESS)
    made.add_argument("--run", help=argparse.SUPPRESS)
    made.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = made.parse_args()
    if chosen.run or chosen.forecast:
        found = run(chosen.run, chosen.quick) if chosen.run else forecasts(chosen.forecast, chosen.quick)
        chosen.out.write_text(json.dumps(found), encoding="utf-8")
    else:
        main("plan", measure, chosen)
