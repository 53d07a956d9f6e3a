"""What the benches share: alternating runs, medians and spreads, fresh processes, facts of the machine, JSON, a table.

A bench is a function ``measure(options) -> Report``; `main` makes a program of it that writes
``bench/results/NAME.json`` and prints its table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from veneer.errors import UserError

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("peft", "trl", "datasets")
REPEATS = 7  # fewest runs of a case whose median is worth a claim
REFUSED = 2  # exit status of a UserError, as the command line's


@dataclass(frozen=True)
class Figure:
    """One line of a table: a median, its quartiles, and what it must reach.

    ``low`` and ``high`` are the quartiles over the runs (the value itself for one run); at most one of ``at_most`` and
    ``at_least`` is given, and a figure without either is there to be read beside the others.
    """

    what: str
    value: float
    unit: str = ""
    low: float = 0.0
    high: float = 0.0
    runs: int = 1
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.at_most is not None:
            return self.value <= self.at_most
        return None if self.at_least is None else self.value >= self.at_least

    @property
    def target(self) -> str:
        """The target in words: ``≤ 0.65``."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        return "" if self.at_least is None else f"≥ {self.at_least:g}"


@dataclass
class Report:
    """What a bench found: its figures, every sample behind them, and the settings they hold for."""

    figures: list[Figure]
    samples: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def figure(what: str, values: Sequence[float] | float, unit: str = "", **rest: Any) -> Figure:
    """The figure of a sample: its median and quartiles; ``rest`` are Figure's ``at_most``, ``at_least``, ``note``."""
    values = [values] if isinstance(values, int | float) else list(values)
    low, high = quartiles(values)
    return Figure(what, statistics.median(values), unit, low, high, len(values), **rest)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile of the values, taken as the whole population."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The quotient of every round: what slows both runs of a round drops out."""
    return [a / b for a, b in zip(above, below, strict=True)]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def alternate(
    cases: Mapping[str, Callable[[], T]], repeats: int, warm_up: int = 0, settle: int = 0
) -> dict[str, list[T]]:
    """What every case gives, ``repeats`` times; the samples at one index belong to one round.

    A round runs every case once, and each round begins with the next case, so that no case always comes first.
    ``warm_up`` rounds before them are not kept. Cases that share a process leave each other a heap of another's shape,
    whose pages the first step after a change takes anew: ``settle`` runs of each case before the one that counts
    bring it into the state in which it would go on.
    """
    names = list(cases)
    samples: dict[str, list[T]] = {name: [] for name in names}
    for turn in range(-warm_up, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(settle):
                cases[name]()
            sample = cases[name]()
            if turn >= 0:
                samples[name].append(sample)
    return samples


def fresh(module: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m MODULE ARGUMENTS --out FILE`` in a process of its own; gives the JSON object written to FILE.

    Raises:
        UserError: the process refused its input; its sentence.
        RuntimeError: it failed; the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # everything is here; a look at the hub would only cost time
        done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == REFUSED and not out.is_file():
            raise UserError(done.stderr.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def say(text: str) -> None:
    """A line about the progress of a long bench, on standard error."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """The hardware, the threads torch uses, and how busy the machine was over the last minute."""
    import torch

    from veneer.train.record import hardware

    facts = hardware(torch.device("cpu")) | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")}
    return facts | {"load": round(os.getloadavg()[0], 2)} if hasattr(os, "getloadavg") else facts


def versions() -> dict[str, str]:
    """Versions of Python, of what Veneer stands on, and of the peers that are installed."""
    from veneer.train.record import versions as own

    found = own()
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``folder/NAME.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def record(name: str, report: Report, facts: dict[str, Any], began: float, quick: bool) -> dict[str, Any]:
    """What a bench's JSON holds; ``began`` is a ``time.time()``, ``facts`` the `machine` before it ran."""
    figures = [asdict(f) | {"target": f.target, "met": f.met} for f in report.figures]
    return {
        "name": name,
        "quick": quick,
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        "seconds": round(time.time() - began, 1),
        "figures": figures,
        "settings": report.settings,
        "samples": report.samples,
        "machine": facts,
        "versions": versions(),
    }


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print the figures of some benches as one table, with the machine and the versions under it."""
    from rich.table import Table

    from veneer.report.screen import screen

    table = Table(title="Veneer's benches", title_justify="left", title_style="bold")
    for heading, right in (("bench", 0), ("what", 0), ("measured", 1), ("quartiles", 1), ("runs", 1), ("target", 1)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "what")
    table.add_column("met")
    for found in records:
        for number, line in enumerate(found["figures"]):
            noted = f"{line['what']} [dim]({line['note']})[/]" if line["note"] else line["what"]
            table.add_row(
                "" if number else found["name"],
                noted,
                f"{digits(line['value'])} {line['unit']}".rstrip(),
                f"{digits(line['low'])} – {digits(line['high'])}" if line["runs"] > 1 else "",
                str(line["runs"]),
                line["target"],
                {True: "[green]yes[/]", False: "[bold red]no[/]", None: ""}[line["met"]],
            )
        table.add_section()
    console = screen()
    console.print(table)
    if records:
        console.print("\n".join(_caption(records)), style="dim", markup=False)


def _caption(records: Sequence[dict[str, Any]]) -> list[str]:
    facts = records[0]["machine"]
    lines = [
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, {facts['system']}",
        ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items()),
    ]
    if any(found["quick"] for found in records):
        lines.append("--quick: few and small runs, which show that the benches work and measure nothing")
    busy = max(found["machine"].get("load", 0.0) for found in records)
    if busy > 0.5 * facts["cores"]:
        lines.append(f"the machine was not idle at the start: load {busy:g}; times, and ratios of times, suffer")
    return lines


def digits(value: float) -> str:
    """Four significant digits, no exponent, no fraction beyond a thousand."""
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1e-4 or not value else f"{value:.1e}"
    )


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    made.add_argument("--quick", action="store_true", help="few and small runs: shows that it works, measures nothing")
    made.add_argument("--repeats", type=positive, help=f"runs of each case; {REPEATS}, with --quick 1")
    return made


def positive(text: str) -> int:
    """A whole number of at least one, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def repeats(options: argparse.Namespace) -> int:
    """How often to run each case: what was asked for, else once when quick, else `REPEATS`."""
    return options.repeats or (1 if options.quick else REPEATS)


def main(name: str, measure: Callable[[argparse.Namespace], Report], options: argparse.Namespace) -> None:
    """Run a bench as a program: measure, write its JSON, print its table."""
    began, facts = time.time(), machine()
    try:
        report = measure(options)
    except UserError as error:
        refuse(str(error))
    found = record(name, report, facts, began, options.quick)
    path = write(name, found)
    show([found])
    say(f"written to {path}")


def refuse(sentence: str) -> NoReturn:
    """End the program with one sentence and the status of a user's mistake."""
    print(f"bench: {sentence}", file=sys.stderr)
    raise SystemExit(REFUSED)
