"""``fit``: a run from data to record, over phases, evaluations, checkpoints and breaks."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.delta import Written
from veneer.errors import UserError
from veneer.io.native import contents
from veneer.train import checkpoint, modes, precision
from veneer.train.display import Display, chosen
from veneer.train.evaluate import better, scores
from veneer.train.feed import BatchFeed, RowFeed, feed, tokenizer_of
from veneer.train.finite import NotFiniteError
from veneer.train.folder import RunFolder, lines_at, record_at
from veneer.train.interrupt import Interrupted, Interrupts
from veneer.train.loss import leaves_padding_out
from veneer.train.processes import Processes
from veneer.train.proof import proof
from veneer.train.record import MemoryMeter, hardware, versions
from veneer.train.resume import look
from veneer.train.settings import HEAD_RATE, RATE, WRITTEN_RATE, Settings
from veneer.train.shards import Whole, gathered, load_state, sharded
from veneer.train.steps import Training, restore
from veneer.train.tasks import Task, task_of

SPEED_WINDOW = 20  # steps over which the shown tokens per second are taken


@dataclass
class Run:
    """What a finished run leaves: every step's loss, the record (also ``run.json``), and where things are."""

    adapter: Adapter
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    record: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None

    @property
    def adapter_path(self) -> Path | None:
        """The saved adapter; None when no ``out`` was given."""
        return None if self.out is None else self.out / "adapter"


def fit(
    adapter: Adapter,
    data: Any,
    out: str | os.PathLike[str] | None = None,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    resume: bool = False,
    display: Display | bool | None = None,
    **settings: Any,
) -> Run:
    """Train an adapter.

    Args:
        adapter: what ``attach`` gave; its model trains in place.
        data: a file, rows, a datasets object, a ``veneer.data.Dataset``, encoded rows, or batches (list, DataLoader).
        out: folder of the run: adapter, checkpoints, log, record, curves. None writes nothing.
        eval_data: like ``data``; held out. None evaluates nothing.
        tokenizer: encodes rows (an image processor for images); by default the one the model was loaded with.
        loss: ``loss(model, batch)``, a mean over the batch, for models and tasks of any other kind.
        resume: go on with the run in ``out``.
        display: who is told what happens; None prints lines, False nothing.
        settings: the fields of ``veneer.train.settings.Settings``: ``epochs``, ``batch_size``, ``lr`` …

    Returns:
        the Run.

    Raises:
        UserError: bad arguments or data, before any work; a loss that is not finite; a folder that cannot be used.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
    """
    job = _Job(adapter, Settings(**settings), Processes(), chosen(display))
    with ExitStack() as stack:
        return job.run(stack, data, out, eval_data, tokenizer, loss, resume)


class _Job:
    """The parts of one call of ``fit``."""

    def __init__(self, adapter: Adapter, settings: Settings, processes: Processes, display: Display) -> None:
        self.adapter, self.settings, self.processes = adapter, settings, processes
        self.display = display if processes.main else chosen(False)
        self.folder: RunFolder | None = None
        self.out: Path | None = None
        self.held: RowFeed | BatchFeed | None = None
        self.best: dict[str, Tensor] | None = None
        self.recent: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW + 1)
        self.board: Any = None

    def run(
        self,
        stack: ExitStack,
        data: Any,
        out: str | os.PathLike[str] | None,
        eval_data: Any,
        tokenizer: Any,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        resume: bool,
    ) -> Run:
        """Set up, go over the phases, finish."""
        self._check(out, eval_data, resume)
        model, settings, processes = self.adapter.model, self.settings, self.processes
        if not any(sharded(p) for p in model.parameters()):
            model.to(processes.device)
        self.task = Task(
            "custom" if loss is not None else task_of(model, settings.task or getattr(data, "task", None)), loss
        )
        self._open(stack, out, resume)
        source = self._feeds(data, eval_data, tokenizer)
        dtype, words = precision.choose(self.adapter, settings.precision, processes.device, loss is None)
        self.dtype = None if loss is not None else dtype
        self.training = Training(self.adapter, source, self.task, settings, processes, self.dtype)
        self.lr = settings.lr or self._usual_rate()
        self.identity = self._identity(source, dtype)
        saved = self._found(resume)
        if saved == "finished":
            return self._finished()
        for context in (
            modes.seeded(settings.seed),
            modes.held_heap(),
            precision.computing(model, dtype),
            modes.recomputing(model) if settings.checkpointing else nullcontext(),
            modes.training(model),
            modes.alone(self.adapter),
        ):
            stack.enter_context(context)
        self.interrupts = stack.enter_context(Interrupts() if self.out is not None else nullcontext(Interrupts()))
        self.meter = MemoryMeter(processes.device).start()
        stack.callback(self.meter.stop)
        self._begin(stack, saved, words)
        self._phases()
        return self._end()

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _check(self, out: Any, eval_data: Any, resume: bool) -> None:
        settings = self.settings
        if self.adapter.name in self.adapter.root.switch.folded:
            raise UserError(f"the adapter {self.adapter.name!r} is folded into the weights: unfold() it, then train")
        if resume and out is None:
            raise UserError("resume was given without out: name the folder of the run to go on with")
        if eval_data is None and (settings.early_stopping or settings.eval_every):
            which = "early_stopping" if settings.early_stopping else "eval_every"
            raise UserError(f"{which} needs held-out data: give eval_data")
        if settings.log and out is None:
            raise UserError(f"log={settings.log} needs a folder to write to: give out")
        if settings.early_stopping and len(self.adapter.phases) > 1:
            raise UserError(f"early_stopping would cut the phases of {self.adapter.recipe} short: leave it out")

    def _open(self, stack: ExitStack, out: str | os.PathLike[str] | None, resume: bool) -> None:
        """Take the run's folder; the main process writes, the others wait for its word."""
        if out is None:
            return
        self.out, refused = Path(out), None
        if self.processes.main:
            try:
                self.folder = RunFolder(out, resume)
                stack.callback(self.folder.close)
            except UserError as error:
                refused = str(error)
        refused = self.processes.from_main(refused)
        if refused:
            raise UserError(refused)

    def _feeds(self, data: Any, eval_data: Any, tokenizer: Any) -> RowFeed | BatchFeed:
        def processor() -> Any:
            return tokenizer if tokenizer is not None else tokenizer_of(self.adapter.model)

        if self.settings.batch_size < self.processes.world:
            raise UserError(
                f"batch_size={self.settings.batch_size} rows cannot be shared by {self.processes.world} processes"
            )
        share = {"world": self.processes.world, "rank": self.processes.rank}
        source = feed(data, self.task, self.settings, processor, by_length=self._by_length(), **share)
        names = source.dataset.label_names if isinstance(source, RowFeed) else None
        if eval_data is not None:
            self.held = feed(eval_data, self.task, self.settings, processor, shuffle=False, label_names=names, **share)
        for rows in (source, self.held):
            if isinstance(rows, RowFeed):
                self._check_rows(rows)
        return source

    def _by_length(self) -> bool:
        """Whether batches hold rows of like length: where padding would be computed on."""
        order, unpadded = self.settings.order, self.task.name == "causal" and leaves_padding_out(self.adapter.model)
        return order == "length" or (order == "auto" and not unpadded)

    def _check_rows(self, rows: RowFeed) -> None:
        from veneer.models import embedding

        table = embedding(self.adapter.model)
        if hasattr(table, "num_embeddings"):
            rows.dataset.check_vocabulary(table.num_embeddings)
        dropped = rows.dataset.dropped
        if dropped:
            first = "; ".join(f"{d.where}: {d.reason}" for d in dropped[:3])
            self.display.event(
                f"{len(dropped)} of {len(dropped) + len(rows.dataset)} rows of {rows.dataset.name} would train nothing "
                f"and are left out ({first}{' …' if len(dropped) > 3 else ''})"
            )

    def _usual_rate(self) -> float:
        """The rate of the recipe's methods, or of the form and the task."""
        methods = (*self.adapter.hooks, *list(self.adapter.deltas.values())[:1])
        known = [m.usual_rate for m in methods if getattr(m, "usual_rate", None) is not None]
        if known:
            return known[0]
        if any(isinstance(d, Written) for d in self.adapter.deltas.values()):
            return WRITTEN_RATE
        return RATE if self.task.name in ("causal", "seq2seq", "custom") else HEAD_RATE

    def _identity(self, source: RowFeed | BatchFeed, dtype: torch.dtype) -> dict[str, Any]:
        """What a run must have in common with the one it goes on with."""
        return {
            **self.settings.binding(),
            "lr": self.lr,
            "precision": precision.WORDS.get(dtype, str(dtype)),
            "task": self.task.name,
            "total_steps": self.training.total,
            "recipe": str(self.adapter.recipe),
            "adapter_seed": self.adapter.seed,
            "selection": self.adapter.select,
            "base": self.adapter.base,
            "data": source.fingerprint,
            "eval_data": None if self.held is None else self.held.fingerprint,
        }

    def _found(self, resume: bool) -> Any:
        """The state to go on from, ``"finished"``, or None for a run from the start; all processes hear the same."""
        found: tuple[str, Any] = ("fresh", None)
        if resume and self.folder is not None:
            try:
                found = look(self.folder, self.identity, self.display.event)
            except UserError as error:
                found = ("refused", str(error))
        word, value = self.processes.from_main(found)
        if word == "refused":
            raise UserError(value)
        return word if word == "finished" else None if value is None else checkpoint.read_state(Path(value), "state")

    def _finished(self) -> Run:
        """The finished run as it lies in its folder, with its adapter put into this one."""
        assert self.out is not None
        description, state = contents(self.out / "adapter")
        restore(self.adapter, description["fields"], description["sites"], description["phase"])
        load_state(self.adapter, state)
        lines = lines_at(self.out)
        losses = [line["loss"] for line in lines if "loss" in line]
        held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
        return Run(self.adapter, losses, held, record_at(self.out) or {}, self.out)

    # -- the run -------------------------------------------------------------------------------------------------------

    def _begin(self, stack: ExitStack, saved: dict[str, Any] | None, words: str) -> None:
        training, adapter = self.training, self.adapter
        if saved is None:
            training.begin_phase(self.lr)
        else:
            training.load(saved["training"], self.lr)
            self.best = saved["best"]
        self._open_board()
        if self.folder is not None:
            self.folder.rewind(training.at.step if saved is not None else -1)
            self.folder.write_record({"finished": False, "recipe": str(adapter.recipe), "identity": self.identity})
        stack.callback(self.display.close)
        self.display.start(training.total, self._facts(words))
        if saved is not None:
            self.display.event(f"{training.at.step} of {training.total} steps are done")
        elif self.held is not None:
            self._evaluate()

    def _facts(self, words: str) -> dict[str, Any]:
        adapter, training, s = self.adapter, self.training, self.settings
        total = sum(p.numel() for p in adapter.model.parameters())
        own = adapter.parameter_count()
        facts = {
            "recipe": str(adapter.recipe),
            "trains": f"{own:,} parameters at {len(adapter.sites)} sites, {own / max(1, total):.2%} of {total:,}",
            "precision": words,
            "rate": f"{self.lr:g}, {s.schedule}, {training.schedule.warmup} steps of warm-up",
            "batch": f"{s.batch_size} rows × {s.accumulate}" if s.accumulate > 1 else f"{s.batch_size} rows",
        }
        if isinstance(training.feed, RowFeed):
            rows = training.feed.dataset
            tokens = f", {rows.tokens:,} tokens" if rows.tokens else ""
            trained = f", {rows.trained:,} of them trained" if self.task.name in ("causal", "seq2seq") else ""
            facts["data"] = f"{rows.name}: {len(rows):,} rows{tokens}{trained}"
        if self.processes.world > 1:
            facts["processes"] = self.processes.world
        if self.out is not None:
            facts["folder"] = str(self.out)
        return facts

    def _phases(self) -> None:
        training, adapter = self.training, self.adapter
        while True:
            while training.at.step < training.phase_end and not training.at.stopped:
                epoch = training.at.epoch
                try:
                    training.take_step()
                except NotFiniteError as error:
                    raise NotFiniteError(f"{error}. {self._advice()}") from None
                self._after_step(ended_epoch=training.at.epoch > epoch)
            if len(training.ends) > 1:
                self.display.event(f"phase {adapter.phases[adapter.phase].name} has ended")
            if not adapter.advance():
                return
            training.begin_phase(self.lr)

    def _advice(self) -> str:
        kept = ""
        if self.out is not None and self.training.at.step:
            self._save()
            kept = f", the adapter as it was before is in {self.out}/checkpoint-{self.training.at.step}/adapter"
        return f"Try a smaller lr, a longer warmup or precision=fp32, or look at those rows{kept}"

    def _after_step(self, ended_epoch: bool) -> None:
        s, training = self.settings, self.training
        step, last = training.at.step, training.at.step == training.total
        due = step % s.eval_every == 0 if s.eval_every else ended_epoch
        line = {"step": step, "loss": training.at.losses[-1], "lr": training.rate, "grad_norm": training.norm}
        line |= {"tokens": training.at.tokens, "seconds": round(training.at.seconds, 3), "epoch": training.at.epoch}
        self._log(line)
        shown = self._shown()
        if self.held is not None and due and not last:
            shown["eval_loss"] = self._evaluate()["loss"]
            self._stop_early(shown["eval_loss"])
        self.display.step(shown)
        asked = self._asked_to_stop()
        every = s.save_every or math.ceil(training.total / 10)
        if self.out is not None and (asked or (step % every == 0 and not last)):
            self._save()
        if asked:
            raise Interrupted(asked, self._farewell())

    def _shown(self) -> dict[str, Any]:
        at, total = self.training.at, self.training.total
        self.recent.append((at.tokens, at.seconds))
        (first_tokens, first_seconds), (tokens, seconds) = self.recent[0], self.recent[-1]
        if len(self.recent) == 1:
            first_tokens, first_seconds = 0, 0.0
        speed = (tokens - first_tokens) / max(seconds - first_seconds, 1e-9)
        return {
            "step": at.step,
            "total": total,
            "loss": at.losses[-1],
            "lr": self.training.rate,
            "tokens_per_second": speed,
            "peak_memory": self.meter.peak,
            "eta": at.seconds / at.step * (total - at.step),
        }

    def _asked_to_stop(self) -> int:
        """The signal that any process received, or 0."""
        asked = self.processes.sum(*[float(self.interrupts.received == n) for n in Interrupts.SIGNALS])
        return next((n for n, count in zip(Interrupts.SIGNALS, asked) if count), 0)

    def _farewell(self) -> str:
        sentence = (
            f"stopped after step {self.training.at.step} of {self.training.total}; everything is in "
            f"{self.out}/checkpoint-{self.training.at.step}: resume goes on from there"
        )
        self.display.event(sentence)
        return sentence

    def _evaluate(self) -> dict[str, float]:
        assert self.held is not None
        found = scores(self.adapter.model, self.held, self.task, self.processes, self.dtype)
        at = self.training.at
        at.held_out.append([at.step, found["loss"]])
        self._log({"step": at.step, **{f"eval_{k}": v for k, v in found.items()}})
        return found

    def _stop_early(self, loss: float) -> None:
        at, patience = self.training.at, self.settings.early_stopping
        if patience is None:
            return
        if better(loss, at.best):
            at.best, at.waited = loss, 0
            self.best = {k: v.clone() for k, v in gathered(self.adapter.state()).items()}
            return
        at.waited += 1
        if at.waited >= patience:
            at.stopped = True
            self.display.event(f"stopping early: the held-out loss has not fallen in {patience} evaluations")

    def _save(self) -> None:
        parts = {
            "state": {"training": self.training.state(), "best": self.best},
            "identity": self.identity,
        }
        adapter = Whole(self.adapter)
        if self.folder is not None:
            checkpoint.save(self.folder, self.training.at.step, parts, adapter, self.settings.save_total)
        self.processes.wait()

    def _log(self, line: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.log(**line)
        if self.board is not None:
            for name, value in line.items():
                if name not in ("step", "seconds"):
                    self.board.add_scalar(name, value, line["step"])

    def _open_board(self) -> None:
        """Open TensorBoard's log when it was asked for."""
        if self.settings.log != "tensorboard" or self.folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("log=tensorboard needs a package: pip install 'veneer[tensorboard]'") from None
        self.board = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=self.training.at.step + 1)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _end(self) -> Run:
        adapter, at = self.adapter, self.training.at
        if self.best is not None:
            load_state(adapter, self.best)
            self.display.event(f"the adapter with the lowest held-out loss ({at.best:.4f}) is kept")
        for hook in adapter.hooks:
            hook.on_end()
        held: dict[str, Any] = {"before": None, "after": None}
        if self.held is not None:
            last = self._evaluate()
            held = {"before": at.held_out[0][1], "after": last["loss"]}
            held |= {"scores": {k: v for k, v in last.items() if k != "loss"}}
        proved = proof(adapter, at.idle or [], held)
        adapter.optimizer = None
        record = self._record(proved, held)
        run = Run(adapter, list(at.losses), [(int(s), v) for s, v in at.held_out], record, self.out)
        whole = Whole(adapter) if self.out is not None else None
        if self.folder is not None and whole is not None:
            whole.save(self.folder.path / "adapter")
            self.folder.write_record(record)
            self._draw()
        if self.board is not None:
            self.board.close()
        self.processes.wait()
        self.display.end(record)
        return run

    def _record(self, proved: dict[str, Any], held: dict[str, Any]) -> dict[str, Any]:
        at, adapter = self.training.at, self.adapter
        return {
            "finished": True,
            "recipe": str(adapter.recipe),
            "task": self.task.name,
            "steps": at.step,
            "epochs": at.epoch,
            "seconds": at.seconds,
            "tokens": at.tokens,
            "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
            "peak_memory": self.meter.stop(),
            "loss": {"first": at.losses[0], "last": at.losses[-1]},
            "held_out": held,
            "parameters": adapter.parameter_count(),
            "stopped_early": at.stopped,
            "warnings": proved.pop("warnings"),
            "proof": proved,
            "settings": self.settings.field_values() | {"lr": self.lr},
            "seeds": {"run": self.settings.seed, "adapter": adapter.seed},
            "data": {"fingerprint": self.identity["data"], "eval": self.identity["eval_data"]},
            "base": adapter.base,
            "processes": self.processes.world,
            "hardware": hardware(self.processes.device),
            "versions": versions(),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "identity": self.identity,
        }

    def _draw(self) -> None:
        from veneer.report import plots

        assert self.folder is not None
        try:
            plots.curves(self.folder.path)
        except OSError as error:
            raise UserError(f"cannot draw {self.folder.path}/curves.png: {error}; the adapter is saved") from error
