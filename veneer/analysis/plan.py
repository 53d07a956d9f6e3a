"""What a recipe will cost on this machine before it runs: a probe of a few small steps, and what follows from it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from veneer.errors import UserError
from veneer.train.display import Silent

SMALL, LARGE = 1, 3  # rows of the two probes; both costs are affine in the rows
STEPS = 3  # of a probe: the first one warms up
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


def forecast(model: nn.Module, job: Job, room: int | None = None) -> Forecast:
    """Probe a job on a loaded model, which is left as it was.

    Two short trainings with 1 and 3 rows give step time and peak memory, both affine in the rows. A job whose weights
    and optimiser state alone exceed ``room`` is not probed.
    """
    import veneer
    from veneer.train.record import anonymous_memory

    began = time.perf_counter()
    vocabulary = model.get_input_embeddings().num_embeddings
    sites = [part.strip() for part in job.sites.split(",")] if "," in job.sites else job.sites
    given = {} if sites == "linear" else {"sites": sites}
    adapter = veneer.attach(
        model, job.recipe, rank=job.rank, name="plan", calibration=_batches(vocabulary, 2, job.length, 4), **given
    )
    start = time.perf_counter() - began
    try:
        trained = adapter.parameter_count()
        facts = {"parameters": trained, "adapter_bytes": _bytes(adapter.state()), "optimizer_bytes": 8 * trained}
        least = anonymous_memory() + (STATE - 4) * trained
        if room is not None and least > ROOM * room:
            return Forecast(job, **facts, memory=least, step=float("nan"), start=start, probed=False)
        found = [_probe(adapter, job, rows, vocabulary) for rows in (SMALL, LARGE)]
    finally:
        adapter.detach()
    step, memory = (_affine(small, large, job.rows) for small, large in zip(*found))
    return Forecast(job, **facts, memory=int(memory), step=step, start=start, probed=True)


def alternatives(model: nn.Module, wanted: Forecast, room: int) -> Iterator[Forecast]:
    """Cheaper jobs of the same kind that fit: recomputation, fewer rows at once, LoRA in place of the recipe."""
    job = wanted.job
    tries = [replace(job, checkpointing=True), replace(job, rows=max(1, job.rows // 4))]
    tries += [replace(job, rows=max(1, job.rows // 4), checkpointing=True)]
    if job.recipe != "lora":
        tries += [replace(job, recipe="lora", rank=16), replace(job, recipe="lora", rank=16, checkpointing=True)]
    for other in tries:
        found = forecast(model, other, room)
        if found.fits(room):
            yield found


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


def _batches(vocabulary: int, rows: int, length: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens, the second half of each row labelled."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return found


def _probe(adapter: Any, job: Job, rows: int, vocabulary: int) -> tuple[float, int]:
    """(seconds of a step, peak bytes) of a short training."""
    import veneer

    clock = _Clock()
    run = veneer.fit(
        adapter, _batches(vocabulary, rows, job.length, STEPS), steps=STEPS, lr=1e-6, display=clock,
        checkpointing=job.checkpointing,
    )  # fmt: skip
    return statistics.median(b - a for a, b in zip(clock.times, clock.times[1:])), run.record["peak_memory"]


def _affine(small: float, large: float, rows: int) -> float:
    slope = max(0.0, (large - small) / (LARGE - SMALL))
    return small + slope * (rows - SMALL)


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())


class _Clock(Silent):
    def __init__(self) -> None:
        self.times: list[float] = []

    def step(self, values: dict[str, Any]) -> None:
        """The moment of each step's end."""
        self.times.append(time.perf_counter())
