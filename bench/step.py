"""One training step against the frozen base alone and against PEFT: 4 × 256 tokens, the last half of each row labelled.

The base is the frozen bf16 model alone in plain transformers: forward with all logits and the loss, and backward to the
input embeddings. Every other case is a whole step of an adapter of rank 16 on the 210 linear layers: forward, backward,
AdamW. All run in one process by turns, so that what slows the machine slows them alike, each turn two steps of which
the second counts; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from bench.harness import Report, alternate, figure, main, parser, ratios, repeats, seconds

MODEL, RANK, RATE, DROPOUT = "smollm2-135m", 16, 1e-4, 0.05
SHAPE, QUICK_SHAPE = (4, 256), (1, 32)  # rows, tokens
SETTLE = 1  # steps of a case before the one that counts
BASE, LORA, DROPPED, DORA, PEFT, PEFT_DORA = "base", "lora", "lora, dropout", "dora", "peft lora", "peft dora"


def measure(options: argparse.Namespace) -> Report:
    """Seconds of each case, and their ratios."""
    rows = batch(*(QUICK_SHAPE if options.quick else SHAPE))
    cases = {
        BASE: floor(rows),
        LORA: ours(rows, "lora"),
        DROPPED: ours(rows, "lora", dropout=DROPOUT),
        DORA: ours(rows, "dora"),
        PEFT: theirs(rows),
        PEFT_DORA: theirs(rows, use_dora=True),
    }
    timed = {name: lambda step=step: seconds(step) for name, step in cases.items()}
    samples = alternate(timed, repeats(options), warm_up=1, settle=0 if options.quick else SETTLE)

    def against(above: str, below: str) -> list[float]:
        return ratios(samples[above], samples[below])

    figures = [
        figure("LoRA step over the frozen base", against(LORA, BASE), at_most=0.65),
        figure(f"with dropout {DROPOUT}", against(DROPPED, BASE), at_most=0.72),
        figure("DoRA step over the frozen base", against(DORA, BASE), at_most=0.80),
        figure("LoRA step over PEFT's", against(LORA, PEFT), at_most=0.50),
        figure("DoRA step over PEFT's", against(DORA, PEFT_DORA)),
        figure("PEFT's LoRA step over the frozen base", against(PEFT, BASE)),
        *(figure(name, taken, "s") for name, taken in samples.items()),
    ]
    settings = {"model": MODEL, "dtype": "bfloat16", "rank": RANK, "shape": list(rows["input_ids"].shape)}
    return Report(figures, samples, settings)


def batch(count: int, width: int) -> dict[str, Any]:
    """Random tokens, the last half of each row labelled."""
    import torch

    ids = torch.randint(0, 49152, (count, width), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : width // 2] = -100
    return {"input_ids": ids, "labels": labels}


def base_model() -> Any:
    """The model in bf16, frozen, in training mode."""
    import torch

    import veneer

    model, _ = veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")
    return model.requires_grad_(False).train()


def floor(rows: dict[str, Any]) -> Callable[[], None]:
    """The frozen base alone: all logits, loss, gradient of the embeddings."""
    model = base_model()
    table = model.get_input_embeddings()

    def step() -> None:
        x = table(rows["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=x, labels=rows["labels"]).loss.backward()

    return step


def ours(rows: dict[str, Any], recipe: str, dropout: float | None = None) -> Callable[[], None]:
    """A step by ``veneer.causal_loss`` and the loop's optimiser."""
    import veneer
    from veneer.train import optimizer

    model = base_model()
    adapter = veneer.attach(model, recipe, rank=RANK, alpha=RANK, dropout=dropout)
    update = optimizer.build(adapter, RATE, 0.0)

    def step() -> None:
        veneer.causal_loss(model, rows).backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


def theirs(rows: dict[str, Any], use_dora: bool = False) -> Callable[[], None]:
    """A step by PEFT over the same bf16 base, with torch's fused AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", use_dora=use_dora)
    model = get_peft_model(base_model(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> None:
        model(**rows).loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main("step", measure, parser(__doc__).parse_args())
