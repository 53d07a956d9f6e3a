"""An adapter in other people's trainers: transformers' Trainer and the ones of TRL that derive from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter
from veneer.errors import UserError
from veneer.io.native import contents
from veneer.numerics.schedule import Schedule
from veneer.train import checkpoint, modes, optimizer
from veneer.train.steps import POINTS, Passes, Runner, overridden, restore
from veneer.train.tasks import Task

KINDS = {"cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant", "inverse_sqrt": "inverse-sqrt"}
STATE, CHANCE = "veneer", "chance"


def trainer_class(adapter: Adapter, base: type) -> type:
    """A subclass of ``base`` that trains ``adapter`` with every hook at its point.

    Loss, data, logging and evaluation stay the base's; the recipe's groups, optimiser, rates and objectives are added.
    Checkpoints hold the adapter in Veneer's own format and the rest as safetensors and JSON, no pickle, and resume bit
    for bit. A recipe of several phases runs one phase a ``train()``: call ``adapter.advance()`` between them.

    Raises:
        UserError: ``base`` is not a Trainer, or what it is asked to do does not go with the recipe.
    """
    from transformers import Trainer, TrainerCallback

    if not (isinstance(base, type) and issubclass(base, Trainer)):
        raise UserError(f"adapter.trainer takes transformers.Trainer or a subclass of it, not {base!r}")
    points = type("Points", (_Points, TrainerCallback), {})
    made = type(f"Veneer{base.__name__}", (_Bridge, base), {"__doc__": trainer_class.__doc__})
    made.veneer, made.veneer_points = adapter, points
    return made


class _Points:
    """The callback that calls the hooks which need nothing but the step."""

    def __init__(self, trainer: _Bridge) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first forward of a step."""
        self.trainer.veneer_rates()
        self.trainer.veneer_call("before_step", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After clipping."""
        self.trainer.veneer_call("before_optimizer", state.global_step)
        self.trainer.veneer_rates()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weights have moved, the gradients are still there."""
        self.trainer.veneer_call("after_step", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer has dropped the gradients of the model; those of the hooks' own tensors are left."""
        self.trainer.veneer.optimizer.zero_grad(set_to_none=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An epoch has ended."""
        self.trainer.veneer_call("on_epoch", round(state.epoch or 0) - 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training has ended: with it the recipe, when this was its last phase."""
        adapter = self.trainer.veneer
        if adapter.phase == len(adapter.phases) - 1:
            adapter.advance()
            for hook in adapter.hooks:
                hook.on_end()
        adapter.optimizer = None


class TrainerSchedule(Schedule):
    """The trainer's own curve of the rate; a group that began later has Veneer's of the same kind, by its own clock."""

    def factor(self, step: int, start: int = 0) -> float:
        """The share of the peak rate at ``step``."""
        curve = self.__dict__["curve"]
        return super().factor(step, start) if start else curve(step)


class Rates:
    """Stands where the trainer expects a torch scheduler: counts steps, tells rates."""

    def __init__(self, trainer: _Bridge) -> None:
        self.trainer, self.last_epoch = trainer, 0

    def step(self, *_: Any) -> None:
        """Count one step and put the next one's rates."""
        self.last_epoch += 1
        self.trainer.veneer_rates()

    def get_last_lr(self) -> list[float]:
        """The groups' rates."""
        return [group["lr"] for group in self.trainer.veneer.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a count."""
        self.last_epoch = state["last_epoch"]


class _Bridge:
    """Mixed into a trainer's class, before it."""

    veneer: Adapter
    veneer_points: type

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not args and "model" not in kwargs:
            kwargs["model"] = self.veneer.model
        if any(kwargs.get("optimizers", ())):
            raise UserError("the recipe gives the optimiser and its rates: leave optimizers out")
        super().__init__(*args, **kwargs)
        if self.model is not self.veneer.model:
            raise UserError("the trainer was given another model than the one the adapter is attached to")
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        fused = any(c.__name__ == "SFTTrainer" for c in type(self).__mro__)
        if fused and any(s.module is head for s in self.veneer.sites):
            raise UserError(
                "TRL's SFTTrainer multiplies by the head's weight itself, so an adapter on the head would not act: "
                "leave the head out of sites, or use fit or transformers.Trainer"
            )
        self.veneer_hooks: dict[str, list[Any]] = {point: [] for point in POINTS}
        self.veneer_runner = Runner(self.veneer, self._veneer_mean, self._veneer_backward)
        self.veneer_weight, self.veneer_training = 1.0, False
        self.add_callback(self.veneer_points(self))

    # -- optimiser and rates -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimiser over the adapter's groups, else the one that the arguments name."""
        if self.optimizer is None or self.veneer.optimizer is None:
            kind, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if any(key in settings for key in ("params", "model", "optimizer_dict")):
                raise UserError(
                    f"optim={self.args.optim} chooses its own tensors: leave it out and name the method in the recipe"
                )
            usual = lambda groups: kind(groups, **settings)  # noqa: E731
            self.optimizer = optimizer.build(self.veneer, self.args.learning_rate, self.args.weight_decay, usual)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The trainer's curve for every group by its own clock; then training starts for the hooks."""
        if self.lr_scheduler is None:
            adapter, args = self.veneer, self.args
            adapter.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            warmup = args.get_warmup_steps(num_training_steps)
            kind = KINDS.get(str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)), "linear")
            schedule = TrainerSchedule(
                num_training_steps,
                args.learning_rate,
                warmup,
                kind,
                accumulate=args.gradient_accumulation_steps,
                clip=args.max_grad_norm or None,
                processes=args.world_size,
            )
            schedule.__dict__["curve"] = self._veneer_curve(num_training_steps, warmup)
            self.veneer_schedule = schedule
            self.veneer_hooks = {p: [h for h in adapter.hooks if overridden(h, p)] for p in POINTS}
            self.lr_scheduler = Rates(self)
            self._created_lr_scheduler = True
            for hook in adapter.hooks:
                hook.on_start(adapter, schedule)
        return self.lr_scheduler

    def _veneer_curve(self, steps: int, warmup: int) -> Any:
        """Step → share of the peak rate, as transformers has it for these arguments."""
        from transformers import get_scheduler

        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        kwargs = self.args.lr_scheduler_kwargs
        made = get_scheduler(self.args.lr_scheduler_type, stand_in, warmup, steps, scheduler_specific_kwargs=kwargs)
        if not hasattr(made, "lr_lambdas"):
            raise UserError(f"lr_scheduler_type={self.args.lr_scheduler_type} is no function of the step: take another")
        return made.lr_lambdas[0]

    def veneer_rates(self) -> None:
        """Put every group's rate for the step to come."""
        optimizer.set_rates(self.veneer, self.veneer.optimizer, self.veneer_schedule, self.lr_scheduler.last_epoch)

    def veneer_call(self, point: str, step: int) -> None:
        """Call the hooks that act at a point."""
        for hook in self.veneer_hooks[point]:
            getattr(hook, point)(step)

    def _clip_grad_norm(self, model: Any) -> Tensor:
        params = optimizer.parameters(self.veneer.optimizer)
        return self.accelerator.clip_grad_norm_(params, self.args.max_grad_norm)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; after the last one of a step the gradients are whole."""
        self.veneer_training, self.veneer_whole = True, num_items_in_batch
        try:
            if self.veneer_hooks["micro_step"]:
                loss = self._veneer_micro_step(model, inputs, num_items_in_batch)
            else:
                loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                self.veneer_call("after_backward", self.state.global_step)
        finally:
            self.veneer_training = False
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss; in training with the passes' auxiliary losses and the recipe's objectives."""
        given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not self.veneer_training:
            return super().compute_loss(model, inputs, **given)
        modes.keep_statistics(self.veneer.model)
        batch, seen = dict(inputs), []
        handle = self.veneer.model.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            with Passes(self.veneer.model) as passes:
                found = super().compute_loss(model, inputs, **given)
        finally:
            handle.remove()
        outputs = Outputs(seen[0] if seen else None, batch, self.veneer_runner)
        terms = (h.loss(outputs, batch, self.veneer_runner) for h in self.veneer_hooks["loss"])
        extra = sum(t for t in (passes.auxiliary(), *terms) if t is not None)
        if isinstance(extra, Tensor):
            extra = extra * self._veneer_share(batch, num_items_in_batch)
        return (found[0] + extra, found[1]) if return_outputs else found + extra

    def _veneer_share(self, batch: dict[str, Any], whole: Any) -> float:
        """The micro-batch's weight in a loss that is normalised over the accumulated batch; 1 for a plain mean."""
        if whole is None:
            return 1.0
        units = Task("causal" if getattr(self, "_loss_shifts_labels", True) else "other").units(batch)
        return units / float(whole) * self.accelerator.num_processes

    def _veneer_micro_step(self, model: Any, inputs: Any, whole: Any) -> Tensor:
        model.train()
        modes.keep_statistics(self.veneer.model)
        batch = self._prepare_inputs(inputs)
        steps = self.current_gradient_accumulation_steps
        self.veneer_weight = 1 / steps if whole is None else self._veneer_share(batch, whole)
        loss = self.veneer_hooks["micro_step"][0].micro_step(self.veneer_runner, batch)
        return loss.detach() * self.veneer_weight

    def _veneer_mean(self, batch: Any) -> Tensor:
        return self.compute_loss(self.model_wrapped, dict(batch))

    def _veneer_backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss * self.veneer_weight)

    # -- saving --------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter in Veneer's format, and what encodes its data; never the base."""
        folder = Path(output_dir or self.args.output_dir)
        self.veneer.save(folder)
        encoder = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if encoder is not None:
            encoder.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        adapter = self.veneer
        state = {
            "training": adapter.training_state(),
            "optimizer": optimizer.state_by_name(adapter, adapter.optimizer),
            "rates": self.lr_scheduler.state_dict(),
        }
        checkpoint.write_state(Path(output_dir), STATE, state)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        state = _read(checkpoint_folder, STATE)
        self._load_from_checkpoint(checkpoint_folder)
        self.veneer.load_training_state(state["training"])
        optimizer.load_state_by_name(self.veneer, self.veneer.optimizer, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["rates"])

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        checkpoint.write_state(Path(output_dir), self._veneer_chance(), checkpoint.random_state())

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.set_random_state(_read(checkpoint_folder, self._veneer_chance()))

    def _veneer_chance(self) -> str:
        return CHANCE if self.args.world_size <= 1 else f"{CHANCE}-{self.args.process_index}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        description, state = contents(resume_from_checkpoint)
        restore(self.veneer, description["fields"], description["sites"], description["phase"])
        self.veneer.load_state(state)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class Outputs:
    """What a hook reads of a forward pass; logits that the trainer's fused loss never made come from a second pass."""

    def __init__(self, outputs: Any, batch: dict[str, Any], runner: Runner) -> None:
        self._outputs, self._batch, self._runner = outputs, batch, runner

    @property
    def logits(self) -> Tensor:
        """(B, T, V), or (B, classes), with gradient."""
        found = getattr(self._outputs, "logits", None)
        if found is None or not found.requires_grad:
            known = {k: v for k, v in self._batch.items() if k != "num_items_in_batch"}
            self._outputs = self._runner(known)
        return self._outputs.logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outputs, name)


def _read(folder: str, name: str) -> Any:
    try:
        return checkpoint.read_state(Path(folder), name)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no whole checkpoint of an adapter ({error}): resume from another") from error
