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
from veneer.analysis.plan import converts, give_back
from veneer.errors import UserError
from veneer.train.display import Silent

CALIBRATION = 8  # batches a recipe may measure before it starts
EVAL_ROWS = 16  # rows a batch in evaluation
SCORES = {  # what a task is scored by beside its loss, its first word first
    "causal": ("exact", "edits"),
    "seq2seq": ("exact", "edits"),
    "classification": ("accuracy", "macro_f1"),
    "token-classification": ("accuracy", "macro_f1"),
    "image-classification": ("accuracy", "macro_f1"),
    "regression": ("pearson", "spearman"),
}


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
    """One run. Of its purposes ``final`` is scored on held-out data; ``search``, for a rate, and ``pace``, for the time
    of a step, on validation rows of the training data."""

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
        from veneer.data import prepare, read_rows
        from veneer.models.fingerprint import base_fingerprint

        self.setting, self.dtype = setting, dtype
        rows = read_rows(setting.data)
        held = read_rows(setting.eval_data) if setting.eval_data else None
        self.rows, options = rows, {"max_length": setting.max_length, "template": setting.template}
        self.model, train = self._load()
        self.task, self.tokenizer = train.task, train.processor
        self._check()
        if held is None:
            train, held_set = train.split(0.05, setting.eval_rows)
        else:
            held_set = prepare(held, self.tokenizer, task=self.task, label_names=train.label_names, **options)
            held_set = held_set.subset(range(min(len(held_set), setting.eval_rows)))
        self.train, self.validation = train.split(0.1, min(64, setting.eval_rows), seed=1)
        self.held = held_set
        self.base = base_fingerprint(self.model)
        self.converted = False

    def _load(self) -> tuple[Any, Any]:
        """The model, with a new head where the task wants one, the same each time, and the rows as its examples."""
        from veneer.analysis.loading import model_and_examples

        s, given = self.setting, {} if self.dtype is None else {"dtype": self.dtype}
        return model_and_examples(
            s.model, self.rows, task=s.task, template=s.template, max_length=s.max_length, **given
        )

    def _check(self) -> None:
        if self.task != "causal" and self.setting.general is not None:
            raise UserError(
                f"--general {self.setting.general} measures forgetting by a language head, and the task is {self.task}"
            )
        if self.task not in ("causal", "seq2seq") and self.setting.answers:
            raise UserError(
                f"--answers {self.setting.answers} counts written answers, and the task is {self.task}, which is "
                "scored on all held-out rows; leave it out"
            )

    @cached_property
    def general(self) -> torch.Tensor:
        """Pieces of general text."""
        return pieces(general_text(self.setting.general), self.tokenizer)

    def facts(self) -> dict[str, Any]:
        """What identifies the base and the data."""
        sets = {"train": self.train, "validation": self.validation, "held_out": self.held}
        return {
            "task": self.task,
            "base": self.base,
            **{f"{name}_rows": len(data) for name, data in sets.items()},
            **{f"{name}_fingerprint": data.fingerprint for name, data in sets.items()},
        }

    @cached_property
    def stamp(self) -> dict[str, Any]:
        """What every line of the record says of where it was made: base, data, versions, hardware."""
        from veneer.train.record import hardware, versions

        prints = {name: value for name, value in self.facts().items() if name == "base" or name.endswith("fingerprint")}
        return prints | {"versions": versions(), "hardware": hardware(next(self.model.parameters()).device)}

    def notes(self) -> list[str]:
        """What was not measured, and why."""
        if self.task == "causal":
            return []
        return [f"Forgetting is not measured: it is read off a language head, and the task is {self.task}."]

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

        if self.converted:  # by the recipe before: taking it off leaves the base as it stored it
            self.model, _ = self._load()
        self.converted = converts(recipe)

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
        give_back()  # or the peak of this run would hold what the one before has left
        try:
            watch = _Watch()
            final = trial.purpose == "final"
            held = self.held if final else self.validation
            before = self._scores(held)["loss"] if final else None
            run = veneer.fit(
                adapter, self.train, display=watch, tokenizer=self.tokenizer, steps=trial.steps, lr=trial.lr,
                batch_size=self.setting.batch_size, seed=trial.seed, order="shuffled", schedule=self.setting.schedule,
                task=self.task,
            )  # fmt: skip
            after = self._scores(held)
            result = {
                **asdict(trial),
                "key": trial.key,
                "recipe_full": str(adapter.recipe),
                "lr_used": run.record["settings"]["lr"],
                "steps_done": run.record["steps"],
                **{k: run.record[k] for k in ("parameters", "tokens", "seconds", "peak_memory", "warnings")},
                "seconds_attach": started,
                "held_out_before": before,
                "held_out_loss": after["loss"],
                **{name: after[name] for name in SCORES[self.task] if name in after},
                "curve": watch.curve,
            }
            if final:
                if self.task == "causal":
                    result |= forgetting(adapter, self.general)
                if self.setting.answers:
                    result |= self._answered()
        finally:
            adapter.detach()
        return result | {"seconds_whole": time.perf_counter() - began}

    def _scores(self, data: Any) -> dict[str, float]:
        from veneer.train.evaluate import scores
        from veneer.train.feed import RowFeed
        from veneer.train.processes import Processes
        from veneer.train.tasks import Task

        task = Task(self.task)
        feed = RowFeed(data, task, EVAL_ROWS, shuffle=False)
        return scores(self.model, feed, task, Processes(), self.model.dtype)

    def _answered(self) -> dict[str, float]:
        """``exact``, the share of held-out prompts whose greedy answer is the completion, blanks aside; and ``edits``,
        the words that would have to be changed to make it so, over the words there are."""
        from veneer.data.metrics import error_rate, exact_match
        from veneer.train.evaluate import generate

        asked, expected = [], []
        for i in range(min(self.setting.answers, len(self.held))):
            item = self.held[i]
            ids, answer = item["input_ids"], item["labels"]
            if self.task == "causal":
                cut = next(k for k, label in enumerate(answer) if label != -100)
                ids, answer = ids[:cut], ids[cut:]
            asked.append(self.tokenizer.decode(ids, skip_special_tokens=self.task == "seq2seq"))
            expected.append(self.tokenizer.decode(answer, skip_special_tokens=True).strip())
        longest = max(len(self.tokenizer(text)["input_ids"]) for text in expected)
        found = [text.strip() for text in generate(self.model, self.tokenizer, asked, max_new_tokens=longest + 2)]
        edits = error_rate([text.split() for text in expected], [text.split() for text in found])
        return {"exact": exact_match(expected, found), "edits": edits}


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
