"""One run of a comparison: a recipe, a seed and a learning rate on a model that is loaded once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from veneer.analysis.forgetting import forgetting, general_text, pieces
from veneer.errors import UserError
from veneer.train.display import Silent

CALIBRATION = 8  # batches a recipe may measure before it starts
EVAL_ROWS = 16  # rows a batch in evaluation


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share; with the data and the base it decides every number but the times."""

    model: str
    data: str
    eval_data: str | None = None
    task: str | None = None
    template: str | None = None
    sites: str = "linear"
    batch_size: int = 8
    max_length: int | None = None
    eval_rows: int = 128
    general: str | None = None
    schedule: str = "linear"
    answers: int = 0  # held-out prompts answered and compared, per run


@dataclass(frozen=True)
class Trial:
    """One run. ``purpose``: ``search`` scores on validation rows of the training data, ``final`` on held-out data."""

    recipe: str
    rank: int | None
    seed: int
    lr: float | None
    steps: int
    purpose: str = "final"

    @property
    def key(self) -> str:
        """The name under which its result is found again."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Bench:
    """The model and the data of a comparison, in memory."""

    def __init__(self, setting: Setting, dtype: torch.dtype | None = None) -> None:
        import veneer
        from veneer.data import prepare, read_rows
        from veneer.data.tasks import detect

        rows = read_rows(setting.data)
        held = read_rows(setting.eval_data) if setting.eval_data else None
        self.setting, self.task = setting, setting.task or detect(rows)
        if self.task != "causal":
            raise UserError(f"{setting.data} is for the task {self.task}; compare takes language-modelling data so far")
        given = {} if dtype is None else {"dtype": dtype}
        self.model, self.tokenizer = veneer.load_model(setting.model, task=self.task, **given)
        options = {"task": self.task, "max_length": setting.max_length, "template": setting.template}
        train = prepare(rows, self.tokenizer, **options)
        if held is None:
            train, held_set = train.split(0.05, setting.eval_rows)
        else:
            held_set = prepare(held, self.tokenizer, **options)
            held_set = held_set.subset(range(min(len(held_set), setting.eval_rows)))
        self.train, self.validation = train.split(0.1, min(64, setting.eval_rows), seed=1)
        self.held = held_set

    @cached_property
    def general(self) -> torch.Tensor:
        """Pieces of general text."""
        return pieces(general_text(self.setting.general), self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """What identifies the base and the data."""
        from veneer.models.fingerprint import base_fingerprint

        sets = {"train": self.train, "validation": self.validation, "held_out": self.held}
        return {
            "base": base_fingerprint(self.model),
            **{f"{name}_rows": len(data) for name, data in sets.items()},
            **{f"{name}_fingerprint": data.fingerprint for name, data in sets.items()},
        }

    def batch_tokens(self, seed: int) -> Callable[[int], int]:
        """Useful tokens of the batch of each step, for any number of epochs."""
        from veneer.data import Batches

        batches = Batches(self.train.lengths, self.setting.batch_size, seed=seed, by_length=False)

        def tokens(step: int) -> int:
            epoch, k = divmod(step, len(batches))
            return int(self.train.lengths[batches.at(epoch)[k]].sum())

        return tokens

    def attach(self, recipe: str, rank: int | None, seed: int) -> Any:
        """The recipe's adapter on the model; ``rank`` is offered where the recipe leaves it open."""
        import veneer
        from veneer.data import Batches

        def calibration():
            batches = Batches(self.train.lengths, self.setting.batch_size, seed=seed)
            return (self.train.batch(batches[k]) for k in range(min(CALIBRATION, len(batches))))

        sites = self.setting.sites
        chosen = [part.strip() for part in sites.split(",")] if "," in sites else sites
        given = {} if chosen == "linear" else {"sites": chosen}
        return veneer.attach(self.model, recipe, rank=rank, seed=seed, calibration=calibration(), name="trial", **given)

    def parameters(self, recipe: str, rank: int | None) -> int:
        """The trained numbers of a recipe at a rank."""
        adapter = self.attach(recipe, rank, 0)
        try:
            return adapter.parameter_count()
        finally:
            adapter.detach()

    def run(self, trial: Trial) -> dict[str, Any]:
        """Train, score and take off again; everything that was measured, as JSON values."""
        import veneer

        began = time.perf_counter()
        adapter = self.attach(trial.recipe, trial.rank, trial.seed)
        started = time.perf_counter() - began
        try:
            watch = _Watch()
            held = self.validation if trial.purpose == "search" else self.held
            before = None if trial.purpose == "search" else self._loss(held)
            run = veneer.fit(
                adapter, self.train, display=watch, tokenizer=self.tokenizer, steps=trial.steps, lr=trial.lr,
                batch_size=self.setting.batch_size, seed=trial.seed, order="shuffled", schedule=self.setting.schedule,
            )  # fmt: skip
            result = {
                **asdict(trial),
                "key": trial.key,
                "recipe_full": str(adapter.recipe),
                "lr_used": run.record["settings"]["lr"],
                "steps_done": run.record["steps"],
                **{k: run.record[k] for k in ("parameters", "tokens", "seconds", "peak_memory", "warnings")},
                "seconds_attach": started,
                "held_out_before": before,
                "held_out_loss": self._loss(held),
                "curve": watch.curve,
            }
            if trial.purpose == "final":
                result |= forgetting(adapter, self.general)
                if self.setting.answers:
                    result["exact"] = self._exact()
        finally:
            adapter.detach()
        return result | {"seconds_whole": time.perf_counter() - began}

    def _loss(self, data: Any) -> float:
        from veneer.train.evaluate import scores
        from veneer.train.feed import RowFeed
        from veneer.train.processes import Processes
        from veneer.train.tasks import Task

        task = Task(self.task)
        feed = RowFeed(data, task, EVAL_ROWS, shuffle=False)
        return scores(self.model, feed, task, Processes(), self.model.dtype)["loss"]

    def _exact(self) -> float:
        """Share of held-out prompts whose greedy answer is the completion, blanks at both ends aside."""
        from veneer.data.metrics import exact_match
        from veneer.train.evaluate import generate

        asked, expected = [], []
        for i in range(min(self.setting.answers, len(self.held))):
            item = self.held[i]
            cut = next(k for k, label in enumerate(item["labels"]) if label != -100)
            asked.append(self.tokenizer.decode(item["input_ids"][:cut]))
            expected.append(self.tokenizer.decode(item["input_ids"][cut:], skip_special_tokens=True).strip())
        longest = max(len(self.tokenizer(text)["input_ids"]) for text in expected)
        found = generate(self.model, self.tokenizer, asked, max_new_tokens=longest + 2)
        return exact_match(expected, [text.strip() for text in found])


class _Watch(Silent):
    """The run's losses with the seconds at which they came."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float, float]] = []
        self.began = time.perf_counter()

    def start(self, total: int, facts: dict[str, Any]) -> None:
        """The clock starts with the first step."""
        self.began = time.perf_counter()

    def step(self, values: dict[str, Any]) -> None:
        """(step, seconds, loss)."""
        self.curve.append((int(values["step"]), round(time.perf_counter() - self.began, 4), float(values["loss"])))
