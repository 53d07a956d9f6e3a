"""A whole fine-tuning job: useful tokens a second, peak anonymous memory and held-out loss, against TRL with PEFT.

SmolLM2-135M-Instruct, LoRA of rank 16 on its 210 linear layers, one epoch over the first rows of a prompt–completion
file, loss on the completion and its end token. Every run is a process of its own, the two sides by turns. Both get the
same encoded rows; the clock runs while they train, not while they import, load, attach or evaluate. Each side makes its
own batches, in a random order of its own; the seed of a run is the number of its round. What was trained is evaluated
in fp32 on both sides, so that losses compare what was learnt and not the precision of the evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Report, alternate, figure, fresh, main, parser, ratios, refuse, repeats, say
from veneer.errors import UserError

MODEL = "smollm2-135m"
DATA = "VENEER_BENCH_DATA"
USUAL = ROOT.parent / "shared" / "data" / "e2e-train.jsonl"
ROWS, HELD_OUT = 256, 128
QUICK_ROWS, QUICK_HELD_OUT = 32, 16
SETTINGS = {"rank": 16, "alpha": 16, "batch_size": 8, "epochs": 1, "lr": 3e-4, "schedule": "linear", "warmup": 0}
SITES = 210
IGNORED = -100


def measure(options: argparse.Namespace) -> Report:
    """Both sides, ``repeats`` times each by turns; with ``--fp32`` TRL's fp32 run as well.

    Raises:
        UserError: the data is missing.
        RuntimeError: the sides trained on different tokens, so that nothing can be compared.
    """
    train, held = data_files(options)
    counts = (QUICK_ROWS, QUICK_HELD_OUT) if options.quick else (ROWS, HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        content = encoded(train, held, *counts, dtypes=("bfloat16", "float32") if options.fp32 else ("bfloat16",))
        job.write_text(json.dumps(content), encoding="utf-8")
        sides = ("veneer", "trl-bf16", *(("trl-fp32",) if options.fp32 else ()))
        rounds = {side: itertools.count() for side in sides}
        cases = {side: lambda side=side: _run(side, job, next(rounds[side])) for side in sides}
        samples = alternate(cases, repeats(options))
    expected = {name: content[name] for name in ("tokens", "trained")}
    for side, runs in samples.items():
        for run in runs:
            found = {name: run[name] for name in expected}
            if found != expected or run["sites"] != SITES:
                raise RuntimeError(f"{side} trained {found} at {run['sites']} sites; expected {expected} at {SITES}")
    say(f"every run trained on {expected['tokens']:,} tokens, {expected['trained']:,} of them with a label")
    same = f"{content['as_trl']} of {counts[0]} rows tokenised as TRL would"
    settings = SETTINGS | expected | {"rows": counts[0], "held_out": counts[1], "data": train.name, "encoding": same}
    return Report(_figures(samples), samples, settings)


def _figures(samples: dict[str, list[dict[str, Any]]]) -> list[Any]:
    ours, theirs = samples["veneer"], samples["trl-bf16"]

    def of(runs: list[dict[str, Any]], name: str) -> list[float]:
        return [run[name] for run in runs]

    speed = ratios(of(ours, "tokens_per_second"), of(theirs, "tokens_per_second"))
    memory = ratios(of(ours, "peak_anonymous"), of(theirs, "peak_anonymous"))
    figures = [
        figure("useful tokens/s over TRL's, bf16", speed, "×", at_least=5.0),
        figure("useful tokens/s, Veneer", of(ours, "tokens_per_second")),
        figure("useful tokens/s, TRL with PEFT, bf16", of(theirs, "tokens_per_second")),
        figure("peak anonymous memory over TRL's, bf16", memory, "×", at_most=0.65),
        figure("peak anonymous memory, Veneer", [b / 1e9 for b in of(ours, "peak_anonymous")], "GB"),
        figure("peak anonymous memory, TRL with PEFT, bf16", [b / 1e9 for b in of(theirs, "peak_anonymous")], "GB"),
        figure("held-out loss, Veneer", of(ours, "held_out_loss")),
        figure("held-out loss, TRL with PEFT, bf16", of(theirs, "held_out_loss")),
    ]
    if "trl-fp32" not in samples:
        return figures
    bar = samples["trl-fp32"]
    behind = statistics.mean(of(ours, "held_out_loss")) - statistics.mean(of(bar, "held_out_loss"))
    return [
        *figures,
        figure("held-out loss, TRL with PEFT, fp32", of(bar, "held_out_loss")),
        figure("held-out loss, Veneer less TRL's fp32, of means", behind, at_most=0.01),
        figure("useful tokens/s, TRL with PEFT, fp32", of(bar, "tokens_per_second")),
        figure("peak anonymous memory, TRL with PEFT, fp32", [b / 1e9 for b in of(bar, "peak_anonymous")], "GB"),
    ]


def data_files(options: argparse.Namespace) -> tuple[Path, Path]:
    """The rows to train on and the held-out rows.

    ``--data``, else the environment's ``VENEER_BENCH_DATA``, else ``../shared/data/e2e-train.jsonl`` beside the
    project; ``--held-out``, else the file of the same name with ``test`` for ``train``.
    """
    train = Path(options.data or os.environ.get(DATA) or USUAL).expanduser().absolute()
    if not train.is_file():
        raise UserError(
            f"there is no file {train} to train on; give a JSONL file of prompt and completion with --data or in {DATA}"
        )
    held = (
        Path(options.held_out).expanduser()
        if options.held_out
        else train.with_name(train.name.replace("train", "test"))
    )
    if held.absolute() == train or not held.is_file():
        raise UserError(f"there is no file of held-out rows beside {train}; name one with --held-out")
    return train, held.absolute()


def encoded(train: Path, held: Path, count: int, held_count: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """What a run needs: rows of ids and labels, the number of tokens and of labels, the model's folder by dtype."""
    import torch

    import veneer
    from veneer.data import prepare
    from veneer.data.read import read_rows
    from veneer.models.gguf import converted
    from veneer.models.load import packaged_path

    _, tokenizer = veneer.load_model(MODEL, device="cpu")
    rows = prepare(train, tokenizer, "causal", limit=count)
    if len(rows) < count:
        raise UserError(f"{train} gives {len(rows)} rows that train something; {count} are needed")
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in read_rows(train, count)]
    joined = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {
        "train": rows.items,
        "held_out": prepare(held, tokenizer, "causal", limit=held_count).items,
        "tokens": rows.tokens,
        "trained": rows.trained,
        "as_trl": sum(item["input_ids"] == ids for item, ids in zip(rows.items, joined, strict=True)),
        "pad": tokenizer.pad_token_id,
        "folders": {dtype: str(converted(packaged_path(MODEL), getattr(torch, dtype))) for dtype in dtypes},
    }


def _run(side: str, job: Path, seed: int) -> dict[str, Any]:
    found = fresh("bench.job", "--side", side, "--job", str(job), "--seed", str(seed))
    say(
        f"{side}: {found['tokens_per_second']:.0f} tokens/s, peak {found['peak_anonymous'] / 1e9:.2f} GB anonymous, "
        f"held-out loss {found['held_out_loss']:.4f}"
    )
    return found


# -- one run, in its own process ---------------------------------------------------------------------------------------


def run_side(side: str, job: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one side and say what it took. The peak is the process's from before the model is loaded to the last step.

    Returns ``seconds`` and ``cpu_seconds`` of training, ``tokens_per_second``, ``peak_anonymous`` (bytes),
    ``held_out_loss``, and what the side says it did: ``tokens``, ``trained``, ``sites``, ``parameters``.
    """
    import torch

    from veneer.train.record import MemoryMeter

    meter = MemoryMeter(torch.device("cpu"), every=0.01).start()
    with tempfile.TemporaryDirectory() as folder:
        given = (job, seed) if side == "veneer" else (job, seed, folder, side.removeprefix("trl-"))
        model, train = (_veneer if side == "veneer" else _trl)(*given)
        loaded, began, cpu = meter.read(), time.perf_counter(), time.process_time()
        told = train()
        took, worked = time.perf_counter() - began, time.process_time() - cpu
    return told | {
        "seconds": took,
        "cpu_seconds": worked,
        "tokens_per_second": told["tokens"] / took,
        "peak_before_training": loaded,
        "peak_anonymous": meter.stop(),
        "held_out_loss": held_out_loss(model, job["held_out"], job["pad"]),
    }


def _veneer(job: dict[str, Any], seed: int) -> tuple[Any, Callable[[], dict[str, Any]]]:
    import veneer
    from veneer.train.feed import feed
    from veneer.train.settings import Settings
    from veneer.train.tasks import Task

    model, _ = veneer.load_model(MODEL, device="cpu")
    adapter = veneer.attach(model, "lora", rank=SETTINGS["rank"], alpha=SETTINGS["alpha"], sites="linear", seed=seed)
    wanted = {name: SETTINGS[name] for name in ("batch_size", "epochs", "lr", "schedule", "warmup")} | {"seed": seed}
    rows = feed(job["train"], Task("causal", None), Settings(**wanted), lambda: None)
    seen = sum(micro.units for micro in rows.epoch(0))

    def train() -> dict[str, Any]:
        run = veneer.fit(adapter, job["train"], display=False, **wanted)
        return {
            "tokens": run.record["tokens"],
            "trained": seen,
            "sites": len(adapter.sites),
            "parameters": adapter.parameter_count(),
            "precision": run.record["identity"]["precision"],
        }

    return model, train


def _trl(job: dict[str, Any], seed: int, folder: str, precision: str) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """TRL's defaults but for two: no gradient checkpointing, which Veneer's run has neither, and no warm-up."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    dtype = {"bf16": "bfloat16", "fp32": "float32"}[precision]
    source = job["folders"][dtype]
    set_seed(seed)  # of the factors, which are drawn before the trainer takes its own
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)),
        args=SFTConfig(
            folder,
            per_device_train_batch_size=SETTINGS["batch_size"],
            num_train_epochs=SETTINGS["epochs"],
            learning_rate=SETTINGS["lr"],
            lr_scheduler_type=SETTINGS["schedule"],
            warmup_steps=SETTINGS["warmup"],
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            seed=seed,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{k: item[k] for k in ("input_ids", "labels")} for item in job["train"]]),
        processing_class=AutoTokenizer.from_pretrained(source),
        peft_config=LoraConfig(
            r=SETTINGS["rank"], lora_alpha=SETTINGS["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )

    def train() -> dict[str, Any]:
        trainer.train()
        named = list(trainer.model.named_parameters())
        return {
            "tokens": int(max(line.get("num_tokens", 0) for line in trainer.state.log_history)),
            "trained": sum(label != IGNORED for row in trainer.train_dataset for label in row["labels"]),
            "sites": sum(".lora_A." in name for name, _ in named),
            "parameters": sum(p.numel() for _, p in named if p.requires_grad),
            "precision": precision,
        }

    return trainer.model, train


def held_out_loss(model: Any, rows: list[dict[str, Any]], pad: int, batch_size: int = 16) -> float:
    """Mean negative log-likelihood of the labelled tokens, in nats, by the model's own forward, in fp32.

    The same few lines for both sides, with neither side's loss in them. A base that was loaded in bf16 keeps the
    rounding of its weights.
    """
    import torch

    model.float().eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            width = max(len(row["input_ids"]) for row in part)
            ids, labels, mask = (
                torch.tensor([[*row, *[fill] * (width - len(row))] for row in values])
                for values, fill in (
                    ([row["input_ids"] for row in part], pad),
                    ([row["labels"] for row in part], IGNORED),
                    ([[1] * len(row["input_ids"]) for row in part], 0),
                )
            )
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            wanted = labels[:, 1:]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
            total += float(losses[wanted != IGNORED].double().sum())
            count += int((wanted != IGNORED).sum())
    return total / count


def _arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--data", help=f"JSONL of prompt and completion; else ${DATA}, else {USUAL.name} beside it")
    made.add_argument("--held-out", help="JSONL of held-out rows; else --data's name with test for train")
    made.add_argument("--fp32", action="store_true", help="also TRL's fp32 runs: the bar of the held-out loss")
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    for own in ("--side", "--job", "--out"):
        made.add_argument(own, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    options = _arguments().parse_args()
    if options.side:
        try:
            result = run_side(options.side, json.loads(Path(options.job).read_text(encoding="utf-8")), options.seed)
        except UserError as error:
            refuse(str(error))
        Path(options.out).write_text(json.dumps(result), encoding="utf-8")
    else:
        main("job", measure, options)
