"""Claims tried: a script of some forty lines says what a paper claims, and this trains, judges and writes.

A script is ``bench/claims/NNN_name.py``, with the sheet's number and the method's name in the registry (a second claim
adds a word: ``022_sara-idle.py``); its result then stands on the method's page::

    \"\"\"Hydra: the sequential branch helps beside the parallel one.\"\"\"

    from bench.claims.harness import Claim, With
    from bench.claims.tasks import Digits
    from bench.claims.verdicts import above

    CLAIM = Claim(
        number=1,
        name="hydra",
        claim="At LoRA's number of parameters Hydra ends at a higher accuracy.",   # the paper's, in one sentence
        task=Digits(),
        contestants={"hydra": With("hydra(rank=2, scaling=2)"), "lora": With("lora", rank=4, alpha=8)},
        rates=(1e-3, 3e-3, 1e-2, 3e-2),
        seeds=5,
        rule=above("hydra", "lora"),
    )

    if __name__ == "__main__":
        CLAIM.main()

Run it by ``python bench/claims/001_hydra.py`` or ``python -m bench.claims 001`` (or ``hydra``); ``python -m
bench.claims`` alone lists what has been found. Options: ``--data FILE`` (tasks that need one), ``--fresh`` (forget
finished runs), ``--out FOLDER``. The result is ``bench/claims/NNN_name.json``. One line is printed per run; each
finished run is kept in the system's temporary folder, so that a killed claim goes on where it was and claims share the
runs of LoRA. A run is known by its task, contestant, rate, seed and measures: after a change to the method's own code
give ``--fresh``.

**Contestants**, by label: a recipe (text); ``With(recipe, **options of veneer.attach)``; or a function of a `Trial`
that trains ``trial.model`` in place by itself, with ``trial.fit(trial.attach(recipe, …))`` where that helps (several
adapters, stages, other data: ``fit`` takes ``task=``, ``lr=`` and settings of ``veneer.fit``). ``With`` also takes
``task=`` (another task than the claim's), ``fit=`` (settings over the task's, as ``{"epochs": 20}``), ``rates=``
(another sweep: only with a reason, say it in ``note``), ``calibrate=True`` (calibration batches; recipes that declare
their need get them anyway) and ``function=``. A contestant that trains nothing is
``With(function=nothing, rates=(0,))``.

**Training** is ``veneer.fit`` with every hook, phase and plan, from the base and in the order of batches of the seed:
runs of one seed differ in the contestant and its rate alone. Every contestant gets the whole sweep on every seed (with
``sweep_seeds=1`` the sweep is on the first seed only, for runs of minutes). Its rate is the one whose *validation*
score, a mean over the seeds, is best; test data are never looked at for it. A best rate at the end of the sweep is
marked ``at_edge`` in the JSON: widen the sweep. A run whose loss is not finite counts as the worst.

**Measures** of a run: the task's scores (``test`` is the one that counts, ``kept`` what is left of the old task),
``validation``, ``train_loss`` (mean of the last epoch's tenth part, at least one step), ``parameters`` (trained),
``seconds`` (of training), and what the script adds as ``measures={"name": function(trial) → number}``; they are taken
after training and may look at ``trial.model``, ``trial.adapter``, ``trial.losses``, ``trial.task``, ``trial.seed``.
``kept_bytes`` is one. ``parameters`` and ``seconds`` work in rules too (seconds mean little on a busy machine).

**Rules** are in ``verdicts``: ``above(a, b, by=0.0, on="test", rate=None)``, ``below``, ``level(a, b, margin)``,
``at_least(a, bound, on=…)``, ``at_most``, ``every(rule, …)``, or any function of a `Results` that gives a `Finding`.
A difference holds when its whole 95 % interval (paired by seed, Student) does: not shown is not the same as refuted.
``untestable="reason"`` in place of a rule records a claim that no run of this size can try (no task or contestants
needed). Scores: accuracies are shares of 1, losses nats.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.claims.tasks import SCRATCH, Task
from bench.claims.verdicts import Finding, Rule, difference, spread
from bench.harness import machine, say, versions
from veneer.errors import UserError

HERE = Path(__file__).resolve().parent
SHOWN, NOT_SHOWN, NOT_TESTABLE = "shown", "not shown", "not testable at this size"


class With:
    """A recipe with options of ``veneer.attach``, or a function of the `Trial`, and how it departs from the claim's."""

    def __init__(
        self,
        recipe: str | None = None,
        *,
        function: Callable[[Trial], None] | None = None,
        task: Task | None = None,
        fit: Mapping[str, Any] | None = None,
        rates: Sequence[float] | None = None,
        calibrate: bool = False,
        **attach: Any,
    ) -> None:
        if (recipe is None) == (function is None):
            raise UserError("a contestant is a recipe or a function=: give one of them")
        self.recipe, self.function, self.task, self.calibrate = recipe, function, task, calibrate
        self.fit, self.rates, self.attach = dict(fit or {}), rates, attach

    def description(self) -> dict[str, Any]:
        """Ready for JSON; what a finished run is known by."""
        from veneer.core.recipe import parse

        offered = {k: self.attach[k] for k in ("rank", "alpha", "dropout") if k in self.attach}
        said = {
            "recipe": None if self.recipe is None else str(parse(self.recipe, **offered)),
            "function": None if self.function is None else _source(self.function),
            "attach": {k: v for k, v in self.attach.items() if k not in offered},
            "fit": self.fit,
            "calibrate": self.calibrate or None,
        }
        said |= {"task": None if self.task is None else self.task.settings()}
        return json.loads(json.dumps({k: v for k, v in said.items() if v}, default=_said))


def nothing(trial: Trial) -> None:
    """The base as it is: a contestant that trains nothing."""


@dataclass
class Trial:
    """One run: a contestant at one rate on one seed. ``adapter`` is None for functions that attach nothing."""

    task: Task
    label: str
    contestant: With
    lr: float
    seed: int
    model: nn.Module
    adapter: Any = None
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def train(self) -> None:
        """Train ``model`` as the contestant says."""
        began = time.perf_counter()
        if self.contestant.function is not None:
            self.contestant.function(self)
            self.seconds = self.seconds or time.perf_counter() - began
        else:
            self.fit(self.attach(self.contestant.recipe, **self.contestant.attach))

    def attach(self, recipe: str, *, task: Task | None = None, **options: Any) -> Any:
        """Attach ``recipe`` to ``model`` with this seed, and with calibration batches where it asks for them."""
        import veneer

        if self.contestant.calibrate or _asks(recipe):
            options["calibration"] = (task or self.task).calibration(self.seed)
        self.adapter = veneer.attach(self.model, recipe, **{"seed": self.seed} | options)
        return self.adapter

    def fit(self, adapter: Any, *, task: Task | None = None, lr: float | None = None, **settings: Any) -> Any:
        """Train an adapter with ``veneer.fit`` (a recipe is attached first), as the task says; gives the adapter."""
        import veneer

        task = task or self.task
        self.adapter = self.attach(adapter, task=task) if isinstance(adapter, str) else adapter
        settings = task.fit | {"seed": self.seed} | self.contestant.fit | settings
        run = veneer.fit(self.adapter, task.data(self.seed), lr=lr or self.lr, display=False, **settings)
        self.losses += run.losses
        self.seconds += run.record["seconds"]
        return self.adapter

    @torch.no_grad()
    def measures(self, further: Mapping[str, Callable[[Trial], float]]) -> dict[str, float]:
        """All measures of the trained model."""
        found = {"validation": self.task.validation(self.model, self.seed)}
        found |= self.task.scores(self.model, self.seed)
        if self.losses:
            found["train_loss"] = statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])
        if self.adapter is not None:
            found["parameters"] = self.adapter.parameter_count()
        found["seconds"] = round(self.seconds, 3)
        return found | {name: float(measure(self)) for name, measure in further.items()}


def kept_bytes(trial: Trial) -> float:
    """A measure: bytes kept for backward in one training forward, each storage once, the model's own left out.

    Take a transformer for it (``texts.Letters``): behind a ReLU a layer's input is kept for the ReLU anyway.
    """
    from veneer.train.loss import causal_loss

    own = {t.untyped_storage().data_ptr() for t in (*trial.model.parameters(), *trial.model.buffers())}
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t  # held by the graph, so that no address is used twice

    batch = trial.task.calibration(trial.seed)[0]
    trial.model.train()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = causal_loss(trial.model, batch) if trial.task.fit.get("task") == "causal" else trial.model(**batch)
    trial.model.eval()
    del out
    return float(sum(found.values()))


class Results:
    """All runs of a claim, and the rate that validation chose for each contestant (``chosen``, where it is known)."""

    def __init__(
        self,
        runs: Sequence[Mapping[str, Any]],
        higher: Mapping[str, bool],
        chosen: Mapping[str, float] | None = None,
    ) -> None:
        self.runs, self.chosen = list(runs), dict(chosen or {})
        for label, upwards in higher.items() if chosen is None else ():
            rates = {run["lr"] for run in self.runs if run["label"] == label}
            self.chosen[label] = max(sorted(rates), key=lambda r: self._merit(label, r, upwards))

    def _merit(self, label: str, rate: float, upwards: bool) -> float:
        scores = [_finite(run, "validation", upwards) for run in self._of(label, rate)]
        return statistics.fmean(scores) if upwards else -statistics.fmean(scores)

    def _of(self, label: str, rate: float) -> Iterator[Mapping[str, Any]]:
        return (run for run in self.runs if run["label"] == label and run["lr"] == rate)

    def values(self, label: str, measure: str = "test", rate: float | None = None) -> list[float]:
        """A measure by seed, in the order of seeds, at the chosen rate or at another of the sweep.

        Raises UserError for a label, rate or measure that no run has.
        """
        if label not in self.chosen:
            raise UserError(f"no contestant is called {label!r}; there are {', '.join(self.chosen)}")
        rate = self.chosen[label] if rate is None else rate
        runs = sorted(self._of(label, rate), key=lambda run: run["seed"])
        if not runs or any(measure not in run["measures"] for run in runs if "measures" in run):
            have = sorted({m for run in self.runs for m in run.get("measures", ())})
            raise UserError(f"no run of {label} at lr {rate:g} has {measure!r}; the measures are {', '.join(have)}")
        if any("measures" not in run for run in runs):
            raise UserError(f"{label} at lr {rate:g}: {next(r['failed'] for r in runs if 'failed' in r)}")
        return [run["measures"][measure] for run in runs]

    def measures(self, label: str) -> list[str]:
        """The measures that every run of a contestant at its chosen rate has."""
        runs = [run.get("measures", {}) for run in self._of(label, self.chosen[label])]
        return [name for name in runs[0] if all(name in run for run in runs)]


def _finite(run: Mapping[str, Any], measure: str, upwards: bool) -> float:
    value = run.get("measures", {}).get(measure, math.nan)
    return value if math.isfinite(value) else -math.inf if upwards else math.inf


@dataclass
class Claim:
    """What a paper claims and how it is tried; see the module's text."""

    number: int
    name: str
    claim: str
    task: Task | None = None
    contestants: Mapping[str, str | With | Callable[[Trial], None]] = field(default_factory=dict)
    rates: Sequence[float] = (1e-3, 3e-3, 1e-2, 3e-2)
    seeds: int = 3
    rule: Rule | None = None
    measures: Mapping[str, Callable[[Trial], float]] = field(default_factory=dict)
    sweep_seeds: int | None = None
    untestable: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not self.untestable and not (self.task and self.contestants and self.rule):
            raise UserError(f"the claim {self.name} needs a task, contestants and a rule, or a reason in untestable=")

    @property
    def stem(self) -> str:
        """``001_hydra``."""
        return f"{self.number:03d}_{self.name}"

    def entrants(self) -> dict[str, With]:
        """The contestants by label, texts and functions made to `With`."""
        return {label: _entrant(given) for label, given in self.contestants.items()}

    def run(self, out: Path = HERE, scratch: Path = SCRATCH, fresh: bool = False) -> dict[str, Any]:
        """Make every run that is not made yet, judge, write ``out/NNN_name.json``; gives its content."""
        began = time.time()
        facts = machine()
        finding, results = Finding(None, self.untestable), None
        if not self.untestable:
            assert self.rule is not None
            results = self._results(_Ledger(scratch / "runs", fresh))
            finding = self.rule(results)
        verdict = {True: SHOWN, False: NOT_SHOWN, None: NOT_TESTABLE}[finding.holds]
        record = {"number": self.number, "name": self.name, "claim": self.claim, "verdict": verdict}
        record |= {"sentence": self._sentence(verdict, finding), "note": self.note}
        record |= {} if results is None else self._findings(results)
        record |= {"began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began))}
        record |= {"seconds": round(time.time() - began, 1), "machine": facts, "versions": versions()}
        out.mkdir(parents=True, exist_ok=True)
        _write(out / f"{self.stem}.json", record)
        say(f"{self.stem}: {record['sentence']}")
        return record

    def _results(self, ledger: _Ledger) -> Results:
        entrants = self.entrants()
        higher = {label: (e.task or self.task).higher for label, e in entrants.items()}
        swept = range(self.seeds)[: self.sweep_seeds]
        plan = [(label, r, s) for s in swept for label, e in entrants.items() for r in e.rates or self.rates]
        runs = self._made(ledger, plan, len(plan) + (self.seeds - len(swept)) * len(entrants))
        if len(swept) == self.seeds:
            return Results(runs, higher)
        chosen = Results(runs, higher).chosen  # by the seeds of the sweep, which every rate has
        rest = [(label, chosen[label], s) for s in range(len(swept), self.seeds) for label in entrants]
        runs += self._made(ledger, rest, len(plan) + len(rest), len(plan))
        return Results(runs, higher, chosen)

    def _made(
        self, ledger: _Ledger, plan: Sequence[tuple[str, float, int]], total: int, done: int = 0
    ) -> list[dict[str, Any]]:
        entrants, runs = self.entrants(), []
        for number, (label, rate, seed) in enumerate(plan, done + 1):
            task = entrants[label].task or self.task
            assert task is not None
            facts = {"task": task.settings(), "fit": task.fit, "contestant": entrants[label].description()}
            facts |= {"lr": rate, "seed": seed, "measures": {name: _source(m) for name, m in self.measures.items()}}
            if entrants[label].function is not None:  # its text does not say what it closes over
                facts |= {"label": label, "claim": self.stem}
            run = ledger.get(facts)
            known = run is not None
            if run is None:
                run = ledger.put(facts, _run(Trial(task, label, entrants[label], rate, seed, nn.Identity()), self))
            runs.append({"label": label, "lr": rate, "seed": seed, **run})
            said = run.get("failed") or _line(run["measures"])
            say(f"{self.stem} {number}/{total} {label} lr {rate:g} seed {seed}: {said}{' (made before)' * known}")
        return runs

    def _sentence(self, verdict: str, finding: Finding) -> str:
        if self.untestable:
            return f"Not testable at this size: {self.untestable}"
        assert self.task is not None
        return f"{verdict.capitalize()} on {self.task.words}, {self.seeds} seeds: {finding.words}."

    def _findings(self, results: Results) -> dict[str, Any]:
        """Task, contestants with means and deviations, paired differences from the first contestant, all runs."""
        assert self.task is not None
        contestants, differences, (first, *others) = {}, [], list(self.contestants)
        for label, entrant in self.entrants().items():
            rates, chosen = list(entrant.rates or self.rates), results.chosen[label]
            scores = {m: _summary(results.values(label, m)) for m in results.measures(label)}
            edge = len(rates) > 2 and chosen in (min(rates), max(rates))
            contestants[label] = {**entrant.description(), "rates": rates, "lr": chosen, "at_edge": edge} | scores
        for other in others:
            for m in (m for m in results.measures(first) if m in results.measures(other) and m != "seconds"):
                if len(results.values(first, m)) == len(results.values(other, m)):
                    found = difference(results.values(first, m), results.values(other, m))
                    limits = {"low": found.low, "high": found.high} if math.isfinite(found.low) else {}
                    differences.append({"of": first, "from": other, "measure": m, "mean": found.mean} | limits)
        said = {"task": self.task.settings(), "fit": self.task.fit, "seeds": self.seeds, "contestants": contestants}
        return said | {"differences": differences, "runs": results.runs}

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run as a program."""
        options = parser(self.claim).parse_args(arguments)
        if options.data:
            os.environ["VENEER_CLAIM_DATA"] = str(Path(options.data).resolve())
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        try:
            record = self.run(Path(options.out), fresh=options.fresh)
        except UserError as error:
            print(f"{self.stem}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        show(record)


def _entrant(given: str | With | Callable[[Trial], None]) -> With:
    if isinstance(given, With):
        return given
    return With(given) if isinstance(given, str) else With(function=given)


def _run(trial: Trial, claim: Claim) -> dict[str, Any]:
    from veneer.train.finite import NotFiniteError

    trial.model = trial.task.model(trial.seed)
    torch.manual_seed(trial.seed)
    try:
        trial.train()
        return {"measures": trial.measures(claim.measures)}
    except NotFiniteError as error:
        return {"failed": str(error)}


def _line(measures: Mapping[str, float]) -> str:
    return " ".join(f"{m} {measures[m]:.4g}" for m in ("validation", "test", "kept", "seconds") if m in measures)


def _asks(recipe: str) -> bool:
    """Whether some method of the recipe looks at data before it starts."""
    from veneer.core import recipe as recipes
    from veneer.core.hook import Init, Ranks

    classes = [part.method.cls for part in recipes.parse(recipe).parts]
    settles = (issubclass(c, Init) and c.settle is not Init.settle for c in classes)
    surveys = (issubclass(c, Ranks) and c.survey is not Ranks.survey for c in classes)
    return any(getattr(c, "needs", None) for c in classes) or any(settles) or any(surveys)


class _Ledger:
    """Finished runs on disk, a file each, named by a hash of what defines the run; all claims share them."""

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.folder, self.fresh = folder, fresh

    def get(self, facts: Mapping[str, Any]) -> dict[str, Any] | None:
        """The run, or None when it is still to make."""
        path = self._path(facts)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not self.fresh else None

    def put(self, facts: Mapping[str, Any], run: dict[str, Any]) -> dict[str, Any]:
        """Keep a finished run; gives it as it will be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._path(facts), run)
        return json.loads(json.dumps(run))

    def _path(self, facts: Mapping[str, Any]) -> Path:
        text = json.dumps(facts, sort_keys=True, default=_said)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def _summary(values: Sequence[float]) -> dict[str, Any]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": list(values)}


def _source(function: Callable[..., Any]) -> str:
    """A function's text, so that a changed one is another."""
    try:
        return inspect.getsource(function).strip()
    except (OSError, TypeError):
        return repr(function)


def _said(value: Any) -> str:
    return _source(value) if callable(value) else str(value)


def _write(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options of every claim."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--data", help="JSONL of prompts and completions, for the tasks that need one")
    made.add_argument("--fresh", action="store_true", help="make every run anew")
    made.add_argument("--out", default=str(HERE), help="folder of the JSON; beside the script by default")
    return made


def show(record: Mapping[str, Any]) -> None:
    """Print the contestants as a table and the verdict under it."""
    from rich.table import Table

    from veneer.report.screen import screen

    console = screen()
    if "contestants" in record:
        table = Table(title=record["claim"], title_justify="left")
        names = ["test", "kept", "train_loss", "parameters", "seconds"]
        known = [n for n in names if any(n in c for c in record["contestants"].values())]
        for heading in ("contestant", "lr", *known):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for label, c in record["contestants"].items():
            cells = [spread(c[n]["values"]) if n in c else "" for n in known]
            table.add_row(label, f"{c['lr']:g}{' (edge)' * c['at_edge']}", *cells)
        console.print(table)
    console.print(f"{record['verdict']}: {record['sentence']}", markup=False)
