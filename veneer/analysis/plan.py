"""What a recipe will cost on this machine before it runs: a probe of a few small steps, and what follows from it."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.analysis.samples import Source, at_random, of_data, size_of
from veneer.data import Dataset
from veneer.errors import UserError
from veneer.train.display import Silent
from veneer.train.modes import trim

SMALL, LARGE = 256, 768  # tokens of the two probes, as nearly as whole rows allow; or images:
IMAGES = (1, 3)
STEPS = 4  # of a probe: the first one warms up, of the others the middle one counts
STATE = 16  # bytes a trained number needs in AdamW: value, gradient, two moments, fp32
ROOM = 0.95  # of the memory at hand that a run may take


@dataclass(frozen=True)
class Job:
    """What is planned: rows of so many tokens a step, and so many steps."""

    recipe: str
    rank: int | None = None
    sites: str = "linear"
    rows: int = 8
    length: int = 256
    steps: int | None = None
    checkpointing: bool = False


@dataclass(frozen=True)
class Forecast:
    """What is expected of a job; memory is peak anonymous memory of the process in bytes, times are seconds."""

    job: Job
    parameters: int
    adapter_bytes: int
    optimizer_bytes: int
    memory: int
    step: float
    start: float
    probed: bool

    def fits(self, room: int) -> bool:
        """Whether the job stays within ``room`` bytes."""
        return self.memory <= ROOM * room


class Probe(NamedTuple):
    """What a short training showed: mean size of a step and its seconds, size of the largest and the bytes by which
    memory rose to its peak, and the seconds by which the first step was longer."""

    usual: float
    seconds: float
    largest: float
    rise: int
    first: float


class Planner:
    """Forecasts for one model. ``load`` gives it, and gives it again when a recipe has converted its weights.

    Two short trainings, of about 256 and 768 tokens a step (1 and 3 images), give step time and peak memory, both
    affine in the tokens; what the first step takes besides (a decomposition, say) counts to the start. A run has a
    process of its own, and this one holds what earlier probes left behind (compiled kernels of their shapes, above
    all): memory is what the process had with the model alone, and what attaching and training add to that.

    Args:
        load: loads the base.
        task: what it learns; read off the model's class when not given.
        data: rows that batches are taken from; random ones of the job's length otherwise.
    """

    def __init__(self, load: Callable[[], nn.Module], task: str | None = None, data: Dataset | None = None) -> None:
        from veneer.train.record import anonymous_memory
        from veneer.train.tasks import task_of

        self.load, self.model, self.data = load, load(), data
        self.task = task_of(self.model, task or (None if data is None else data.task))
        self._loaded = anonymous_memory()

    def forecast(self, job: Job, room: int | None = None) -> Forecast:
        """Probe a job; one whose weights and optimiser state alone exceed ``room`` is not probed."""
        found = self._forecast(job, room)
        if converts(job.recipe):
            self.model = self.load()
        give_back()
        return found

    def _forecast(self, job: Job, room: int | None) -> Forecast:
        import veneer
        from veneer.train.record import anonymous_memory

        give_back()
        before = anonymous_memory()
        began, source = time.perf_counter(), self._source(job)
        sites = [part.strip() for part in job.sites.split(",")] if "," in job.sites else job.sites
        given = {} if sites == "linear" else {"sites": sites}
        adapter = veneer.attach(
            self.model, job.recipe, rank=job.rank, name="plan", calibration=source.make(2, 4), **given
        )
        start = time.perf_counter() - began
        give_back()
        standing = self._loaded + anonymous_memory() - before
        try:
            trained = adapter.parameter_count()
            facts = {"parameters": trained, "adapter_bytes": _bytes(adapter.state()), "optimizer_bytes": 8 * trained}
            least = standing + (STATE - 4) * trained
            if room is not None and least > ROOM * room:
                return Forecast(job, **facts, memory=least, step=float("nan"), start=start, probed=False)
            found = [self._probe(adapter, job, source, rows) for rows in _probed_rows(self.task, job.rows, source.row)]
        finally:
            adapter.detach()
        step = _on_line([(p.usual, p.seconds) for p in found], source.usual)
        memory = standing + _on_line([(p.largest, p.rise) for p in found], source.largest)
        start += found[-1].first
        return Forecast(job, **facts, memory=int(memory), step=step, start=start, probed=True)

    def words(self, length: int) -> str:
        """What a row is, in the plural: ``rows × 256 tokens``."""
        return "images" if self.task == "image-classification" else f"rows × {length} tokens"

    def alternatives(self, wanted: Forecast, room: int) -> Iterator[Forecast]:
        """Cheaper jobs of the same kind that fit: recomputation, fewer rows at once, LoRA in place of the recipe."""
        job = wanted.job
        few = replace(job, rows=max(1, job.rows // 4))
        tries = [replace(job, checkpointing=True), few, replace(few, checkpointing=True)]
        if job.recipe != "lora":
            lora = replace(job, recipe="lora", rank=16)
            tries += [lora, replace(lora, checkpointing=True)]
        for other in tries:
            found = self.forecast(other, room)
            if found.fits(room):
                yield found

    def _source(self, job: Job) -> Source:
        if self.data is None:
            return at_random(self.model, self.task, job.rows, job.length)
        from veneer.train.loss import leaves_padding_out

        return of_data(self.data, job.rows, not (self.task == "causal" and leaves_padding_out(self.model)))

    def _probe(self, adapter: Any, job: Job, source: Source, rows: int) -> Probe:
        """A short training."""
        import veneer
        from veneer.train.record import anonymous_memory

        clock, batches = Clock(), source.make(rows, STEPS)
        give_back()
        before = anonymous_memory()
        run = veneer.fit(
            adapter, batches, task=self.task, steps=STEPS, lr=1e-6, display=clock, checkpointing=job.checkpointing
        )
        sizes = [size_of(batch) for batch in batches]
        usual, rise = statistics.fmean(sizes[1:]), max(0, run.record["peak_memory"] - before)
        seconds = usual * statistics.median(t / size for t, size in zip(clock.steps()[1:], sizes[1:], strict=True))
        return Probe(usual, seconds, max(sizes), rise, max(0.0, clock.steps()[0] - seconds * sizes[0] / usual))


def converts(recipe: str) -> bool:
    """Whether a recipe stores the base in another way, which taking the adapter off leaves."""
    from veneer.core.recipe import parse

    return any(part.method.axis == "base" for part in parse(recipe).parts)


def words(found: Forecast, wanted: Job) -> str:
    """An alternative in a few words: what it changes."""
    job, parts = found.job, []
    if job.recipe != wanted.recipe:
        parts.append(f"{job.recipe} rank {job.rank}")
    if job.rows != wanted.rows:
        parts.append(f"batches of {job.rows} rows with --accumulate {-(-wanted.rows // job.rows)}")
    if job.checkpointing and not wanted.checkpointing:
        parts.append("gradient checkpointing")
    return " with ".join(parts)


def memory_at_hand() -> int:
    """Bytes that a new process may take without pushing others out."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parsed_bytes(text: str) -> int:
    """``"2GiB"``, ``"1500M"`` or a plain number of bytes."""
    units = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
    stem = text.strip().lower().removesuffix("b").removesuffix("i")
    number, unit = (stem[:-1], stem[-1:]) if stem[-1:] in "kmg" else (stem, "")
    try:
        return int(float(number) * units[unit])
    except ValueError:
        raise UserError(f"--memory {text}: a size such as 2GiB or 1500M was expected") from None


def give_back() -> None:
    """Return freed memory to the system: a run in a process of its own would not meet it."""
    gc.collect()
    trim()


def _probed_rows(task: str, rows: int, size: float) -> list[int]:
    """Rows of the two probes, the second no larger than the job; one probe where the job has one row."""
    wanted = IMAGES if task == "image-classification" else [max(1, round(tokens / size)) for tokens in (SMALL, LARGE)]
    large = min(rows, max(wanted[1], wanted[0] + 1))
    return sorted({min(wanted[0], max(1, large // 2)), large})


def _on_line(points: list[tuple[float, float]], at: float) -> float:
    """The value at ``at`` of the line through two points, which never falls; a lone point's own value."""
    (x, y), (last, value) = points[0], points[-1]
    slope = max(0.0, (value - y) / (last - x)) if last > x else 0.0
    return max(y, value) + slope * (at - last) if last > x else value


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


class Clock(Silent):
    """A display that keeps when the run began and when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def start(self, total: int, facts: dict[str, Any]) -> None:
        """The moment of the start."""
        self.times = [time.perf_counter()]

    def step(self, values: dict[str, Any]) -> None:
        """The moment of a step's end."""
        self.times.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step."""
        return [after - before for before, after in pairwise(self.times)]
