"""A step with each optimiser and allocator beside a plain LoRA step with AdamW: 4 × 256 tokens, last halves labelled.

LoRA of rank 16 on the 210 linear layers; whole steps of the training loop, from the batch to the cleared gradients,
clipping included. Each case runs by turns with the plain one in this process and goes before the next comes; a ratio is
the median of the rounds' ratios. What happens now and then is spread over the steps between:

- AdaLoRA closes components at its default in the steps between the first tenth of a run and the last three; these and
  the others are spread over a run;
- IncreLoRA scores its sites in some of the first six tenths of a run's steps, and grows in fewer; both are spread over
  a run of 1000 steps. Its steps are taken with half of the rounds done, sites drawn at random: ranks and waiting
  components are 16 a site then, as ranks are at the end;
- DiffoRA, PC-DARTS and elastic are in the first of their phases, which searches or trains the whole of the net. CoLoRA,
  Flexora and N2N decide before training, in steps of their own, and then take LoRA's;
- GaLore's decompositions are the first step over a later one, in shares of the 200 steps of a period.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
from typing import Any

from bench.harness import Figure, Report, alternate, figure, main, parser, ratios, repeats, say, seconds
from bench.pieces import can_add, earlier
from bench.step import MODEL, QUICK_SHAPE, RANK, RATE, SETTLE, SHAPE, base_model, batch

PLAIN = "lora"
RUN = 1000  # steps of the schedule, of which a few are taken
GROWING = 0.6  # share of a run in which IncreLoRA scores its sites
START = RANK  # the rank that every allocator starts from

SCORED, OTHER = "increlora, scored step", "increlora, other step"
CLOSING, WAITING = "adalora, closing step", "adalora, other step"
PRUNING = 0.6  # share of a run in which AdaLoRA closes components

CASES = {
    "lora-pro": "lora+lora-pro",
    "lora-pro, efficient": "lora+lora-pro(mode='efficient')",
    "lora-ggpo": "lora+lora-ggpo",
    "allora": "lora+allora",
    "lora-plus": "lora+lora-plus",
    CLOSING: f"adalora(rank={START * 2 // 3}, initial={START}, wait=0)",
    WAITING: f"adalora(rank={START * 2 // 3}, initial={START})",
    "sora": "sora",
    "dynamic-rank": "dynamic-rank",
    "dylora": "dylora",
    "triadaptlora": "triadaptlora",
    SCORED: f"increlora+increlora-ranks(rank={START}, scores={RUN})",
    OTHER: f"increlora+increlora-ranks(rank={START}, scores=1)",
    "full": "full",
    "galore": "galore",
    "galore, randomised": "galore(svd='randomized')",
    "galore, 8 bits": "galore(svd='randomized', bits=8)",
    "fira": "fira(svd='randomized')",
    "frugal": "frugal",
    "lisa": "full+lisa",
    "owlore": "full+owlore+galore(svd='randomized')",
    "lr-batch": "lora+lr-batch",
    "m-fac": "lora+m-fac",
    "man": "lora+man",
    "diffora": f"diffora(rank={RANK})",
    "pc-darts": "pc-darts",
    "elastic": "lora+elastic",
}
TARGETS = {"lora-pro": 1.15, "lora-pro, efficient": 1.15, "sora": 1.05}
PERIOD, REFRESH = 200, 0.10


def measure(options: argparse.Namespace) -> Report:
    """Seconds of every case and of the plain one beside it, and their ratios."""
    rows, rounds = batch(*(QUICK_SHAPE if options.quick else SHAPE)), repeats(options)
    settings = {"model": MODEL, "dtype": "bfloat16", "rank": RANK, "shape": list(rows["input_ids"].shape)}
    settings |= {"quick": options.quick, "recipes": CASES}
    samples: dict[str, Any] = earlier("optim", settings) if options.add else {}
    plain = training(rows, "lora").take_step
    for label in options.only or CASES:
        say(f"optim: {label}")
        run = training(rows, CASES[label])
        grown = half_grown(run) if label in (SCORED, OTHER) else {}
        first = seconds(run.take_step)
        timed = {PLAIN: lambda: seconds(plain), label: lambda step=run.take_step: seconds(step)}
        found = alternate(timed, rounds, warm_up=1, settle=0 if options.quick else SETTLE)
        samples[label] = found | {"first": first} | grown
        del run, timed
        gc.collect()
    ordered = {label: samples[label] for label in CASES if label in samples}
    return Report([*steps(ordered), *spread(ordered)], ordered, settings)


def steps(samples: dict[str, Any]) -> list[Figure]:
    """A step of each case over the plain one's of the round."""
    return [
        figure(f"{label}, over LoRA with AdamW", ratios(s[label], s[PLAIN]), at_most=TARGETS.get(label))
        for label, s in samples.items()
    ]


def spread(samples: dict[str, Any]) -> list[Figure]:
    """What happens now and then, in the terms of the steps between."""
    figures = []
    if SCORED in samples and OTHER in samples:
        scored, other = samples[SCORED], samples[OTHER]
        a, b = ratios(scored[SCORED], scored[PLAIN]), ratios(other[OTHER], other[PLAIN])
        share, often = GROWING * scored["scores"] / scored["every"], GROWING / scored["every"]
        mean = [y + share * (x - y) + often * scored["growth"] / s for x, y, s in zip(a, b, other[PLAIN])]
        figures.append(figure("increlora, over LoRA with AdamW, amortised", mean, at_most=1.05))
    if CLOSING in samples and WAITING in samples:
        a, b = (ratios(samples[label][label], samples[label][PLAIN]) for label in (CLOSING, WAITING))
        mean = [PRUNING * x + (1 - PRUNING) * y for x, y in zip(a, b)]
        figures.append(figure("adalora, over LoRA with AdamW, amortised", mean, at_most=1.05))
    for label in ("galore", "galore, randomised"):
        if label in samples:
            share = [(samples[label]["first"] - s) / (PERIOD * s) for s in samples[label][label]]
            figures.append(figure(f"{label}: decompositions, share of a period", share, at_most=REFRESH))
    return figures


def training(rows: dict[str, Any], recipe: str) -> Any:
    """A run of the loop on one batch, before its first step."""
    import veneer
    from veneer.train.feed import BatchFeed
    from veneer.train.processes import Processes
    from veneer.train.settings import Settings
    from veneer.train.steps import Training
    from veneer.train.tasks import Task

    own = {"rank": RANK, "alpha": RANK} if recipe.startswith("lora") or recipe in SIMPLE else {}
    adapter = veneer.attach(base_model(), recipe, sites="linear", calibration=[rows], seed=0, **own)
    adapter.model.train()
    task = Task("causal")
    made = Training(adapter, BatchFeed([rows], task), task, Settings(steps=RUN, warmup=0), Processes())
    made.begin_phase(RATE)
    return made


SIMPLE = ("sora", "dynamic-rank", "dylora", "triadaptlora")


def half_grown(run: Any) -> dict[str, float]:
    """Let sites drawn at random grow for half of the rounds.

    Gives the seconds of a round, the steps between two, and how many of these are scored by default.
    """
    hook = next(h for h in run.adapter.hooks if hasattr(h, "room"))
    draw, taken, room = random.Random(0), [], hook.room
    while hook.room > room // 2:
        hook.sensitivity = {path: draw.random() for path in hook.sensitivity}
        hook.uncertainty = dict.fromkeys(hook.sensitivity, 1.0)
        taken.append(seconds(lambda: hook._grow(run.at.step)))
    return {"growth": statistics.median(taken), "every": hook.every, "scores": type(hook).scores}


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=list(CASES), help="some of the cases")
    can_add(made)
    main("optim", measure, made.parse_args())
