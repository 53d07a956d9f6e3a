"""adapter.trainer: transformers' Trainer and TRL's SFTTrainer give the loop's own losses, hooks, clipping and all."""

import pytest
import torch
from small_runs import VOCABULARY, collated, encoded, llama

import veneer
from veneer.train.loop import fit

STEPS, SIZE = 6, 4


class Order(torch.utils.data.Dataset):
    """Rows in a fixed order, as a plain torch data set."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def attached(recipe):
    torch.manual_seed(0)
    calibration = collated(encoded(8, 3), 4)
    wants = {"calibration": calibration} if "eva" in recipe else {}
    return veneer.attach(llama(), recipe, rank=4, **wants)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(2, VOCABULARY)} | {"<pad>": 0, "<eos>": 1}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )


def settings(folder, **changes):
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.1,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "logging_first_step": True,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "bf16": False,
        "activation_checkpointing": False,
    } | changes


def trainer(adapter, rows, folder, **changes):
    from transformers import Trainer, TrainingArguments

    from veneer.data import Collator

    return adapter.trainer(Trainer)(
        args=TrainingArguments(**settings(folder, **changes)), train_dataset=Order(rows), data_collator=Collator(0)
    )


def sft_trainer(adapter, rows, folder, **changes):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from veneer.data import Collator

    return adapter.trainer(SFTTrainer)(
        args=SFTConfig(**settings(folder, **changes), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(0),
        processing_class=tokenizer(),
    )


def losses(made):
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def from_loop(recipe, rows, **changes):
    adapter = attached(recipe)
    given = {"accumulate": 2, "lr": 1e-2, "clip": 0.1, "warmup": 0, "precision": "fp32", "display": False}
    return fit(adapter, collated(rows, SIZE), steps=STEPS, **given | changes), adapter


@pytest.mark.parametrize("make", [trainer, sft_trainer])
@pytest.mark.parametrize("recipe", ["lora+sora+ba-lora", "lora+eva+lora-pro"])
def test_trainers_get_the_loops_own_losses(tmp_path, recipe, make):
    rows = encoded(2 * SIZE * STEPS)
    run, by_loop = from_loop(recipe, rows)
    adapter = attached(recipe)
    made = make(adapter, rows, tmp_path)
    made.train()
    assert losses(made) == pytest.approx(run.losses, abs=1e-5)
    assert torch.allclose(adapter.vector(), by_loop.vector(), atol=1e-4)


def test_every_hook_point_is_reached_in_the_trainer(tmp_path):
    from veneer.core.hook import Hook

    def spying(seen):
        class Spy(Hook):
            name = "spy"

            def on_start(self, adapter, schedule):
                seen.append(("on_start", schedule.steps))

            def before_step(self, step):
                seen.append(("before_step", step))

            def loss(self, outputs, batch, run):
                seen.append("loss")
                return 0.1 * outputs.logits.square().mean()

            def after_backward(self, step):
                norm = torch.stack([p.grad.norm() for p in self.adapter.parameters()]).norm()
                seen.append(("after_backward", norm > 0.1))

            def before_optimizer(self, step):
                norm = torch.stack([p.grad.norm() for p in self.adapter.parameters()]).norm()
                seen.append(("before_optimizer", norm <= 0.1001))

            def after_step(self, step):
                seen.append(("after_step", any(p.grad is not None for p in self.adapter.parameters())))

            def on_epoch(self, epoch):
                seen.append(("on_epoch", epoch))

            def on_phase_end(self, phase):
                seen.append("on_phase_end")

            def on_end(self):
                seen.append("on_end")

        return Spy()

    rows = encoded(2 * SIZE * STEPS)
    in_loop, in_trainer = [], []
    for seen in (in_loop, in_trainer):
        adapter = attached("lora")
        spy = spying(seen)
        spy.adapter = adapter
        adapter.hooks.append(spy)
        if seen is in_loop:
            fit(
                adapter, collated(rows, SIZE), steps=STEPS, accumulate=2, lr=1e-2, clip=0.1, warmup=0, precision="fp32",
                display=False,
            )  # fmt: skip
        else:
            trainer(adapter, rows, tmp_path).train()
    assert in_trainer == in_loop
    assert ("after_step", True) in in_loop and ("before_optimizer", False) not in in_loop


def test_micro_step_replaces_the_trainers_own_pass(tmp_path):
    from veneer.core.hook import Hook

    class Twice(Hook):
        name = "twice"

        def micro_step(self, run, batch):
            run.backward(0.5 * run.loss(batch))
            loss = run.loss(batch)
            run.backward(0.5 * loss)
            return loss

    rows = encoded(2 * SIZE * STEPS)
    for make in (trainer, sft_trainer):
        adapter = attached("lora")
        adapter.hooks.append(Twice())
        made = make(adapter, rows, tmp_path)
        made.train()
        assert losses(made) == pytest.approx(from_loop("lora", rows)[0].losses, abs=1e-5)


def test_a_trainer_resumes_from_its_checkpoint_without_pickles(tmp_path):
    rows, recipe = encoded(2 * SIZE * STEPS), "lora+sora+ba-lora"
    whole = attached(recipe)
    trainer(whole, rows, tmp_path / "whole").train()
    first = trainer(attached(recipe), rows, tmp_path / "broken", save_strategy="steps", save_steps=2)
    first.add_callback(Stop(4))
    first.train()
    names = {p.name for p in (tmp_path / "broken" / "checkpoint-4").rglob("*")}
    assert not any(n.endswith((".pt", ".pth", ".bin", ".pkl")) for n in names)
    adapter = attached(recipe)
    second = trainer(adapter, rows, tmp_path / "broken", save_strategy="steps", save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert torch.equal(adapter.vector(), whole.vector())
    loaded = veneer.load(llama(), tmp_path / "broken" / "checkpoint-6")
    assert loaded.recipe.part("ranks") is not None


def Stop(after):
    from transformers import TrainerCallback

    class Stopper(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == after

    return Stopper()


def test_the_trainer_evaluates(tmp_path):
    rows = encoded(2 * SIZE * STEPS)
    from transformers import Trainer, TrainingArguments

    from veneer.data import Collator

    adapter = attached("lora")
    args = TrainingArguments(**settings(tmp_path, eval_strategy="steps", eval_steps=3, max_steps=6))
    made = adapter.trainer(Trainer)(
        args=args, train_dataset=Order(rows), eval_dataset=Order(rows[:8]), data_collator=Collator(0)
    )
    made.train()
    assert [line["step"] for line in made.state.log_history if "eval_loss" in line] == [3, 6]


def test_what_a_trainer_cannot_do_is_refused_in_one_sentence(tmp_path):
    from trl import SFTTrainer

    with pytest.raises(veneer.UserError, match="takes transformers"):
        attached("lora").trainer(dict)
    head = veneer.attach(llama(), "lora", rank=4, sites=["lm_head"])
    with pytest.raises(veneer.UserError, match="leave the head out"):
        sft_trainer(head, encoded(8), tmp_path)
    assert issubclass(attached("lora").trainer(SFTTrainer), SFTTrainer)
