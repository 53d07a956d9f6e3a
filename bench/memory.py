"""Bytes of optimiser state and of what is kept for backward, and peak memory, of methods that claim to save them.

SmolLM2-135M, the linear layers of its blocks. State is counted after two steps of the method's own optimiser, every
tensor of it. Kept bytes are those of saved-tensor hooks up to the last hidden state (`bench.memory_kept`). Both stand
beside what `bench.memory_formulas` says of them from the model's config. The gradients are the most bytes of them that
lie at trained tensors at once, counted as each arrives. The peak is of resident anonymous memory in a process of its
own, over the steps; at 4 × 256 tokens it is reached as backward begins, where gradients are few whatever becomes of
them. Decompositions are randomised ones, which changes no size.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import memory_formulas as formulas
from bench.harness import Report, figure, fresh, main, parser
from bench.memory_kept import MEGABYTE, kept
from bench.pieces import can_add, earlier
from bench.step import QUICK_SHAPE, RANK, SHAPE, base_model, batch

CASES = {
    "full": "full",
    "lora": f"lora(rank={RANK})",
    "galore": "galore(rank=128, svd='randomized')",
    "galore, 8 bits": "galore(rank=128, svd='randomized', bits=8)",
    "galore, per layer": "galore(rank=128, svd='randomized', per_layer=True)",
    "fira": "fira(rank=128, svd='randomized')",
    "frugal": "frugal",
    "lisa": "full+lisa(blocks=2, period=2)",
    "owlore": "full+owlore(blocks=5, period=2)+galore(rank=128, gap=100, scale=1.0, svd='randomized')",
    "lst": "lst",
    "sherl": "sherl",
    "paca": f"paca(rank={RANK})",
    "s2ft": "s2ft",
}
TOLERANCE = 0.03
STEPS = 2


def measure(options: argparse.Namespace) -> Report:
    """Every case in a process of its own; formulas in bytes."""
    from veneer.core import registry

    shape = QUICK_SHAPE if options.quick else SHAPE
    known = {m.name for m in registry.methods()}
    cases = {label: recipe for label, recipe in CASES.items() if recipe.split("(")[0].split("+")[0] in known}
    settings = {"dtype": "bfloat16", "shape": list(shape), "steps": STEPS, "recipes": cases}
    made = earlier("memory", settings) if options.add else {}
    for label in options.only or cases:
        made[label] = fresh("bench.memory", "--case", label, *(["--quick"] if options.quick else []))
    found = {label: made[label] for label in cases if label in made}
    figures = []
    for label, one in found.items():
        for what, name in (("state", "state"), ("kept", "kept for backward")):
            formula = one[f"{what} formula"]
            note = f"formula {formula / MEGABYTE:.4g} MB"
            figures.append(figure(f"{label}: {name}", one[what] / MEGABYTE, "MB", note=note))
            figures.append(figure(f"{label}: {name} off its formula", abs(one[what] / formula - 1), at_most=TOLERANCE))
        if "gradients" in one:
            figures.append(figure(f"{label}: gradients at once", one["gradients"] / MEGABYTE, "MB"))
        if "gradients" in one and label == "galore, per layer":
            share = one["gradients"] / one["largest gradient"]
            figures.append(figure(f"{label}: gradients at once, of the largest layer's", share, at_most=1.0))
        figures.append(figure(f"{label}: peak anonymous memory", one["peak"] / MEGABYTE, "MB"))
    return Report(figures, found, settings)


def one(label: str, quick: bool) -> dict[str, float]:
    """The bytes of one case, in this process."""
    import veneer
    from veneer.models.fast import fast_forms
    from veneer.numerics.schedule import Schedule
    from veneer.parts.plain import plain
    from veneer.train.loss import causal_loss
    from veneer.train.optimizer import build
    from veneer.train.record import MemoryMeter

    shape = QUICK_SHAPE if quick else SHAPE
    model, rows = base_model(), batch(*shape)
    adapter = veneer.attach(model, CASES[label], calibration=[rows], seed=0, sites="linear")
    schedule = Schedule(100, 1e-4)
    adapter.optimizer = build(adapter, 1e-4, 0.0)
    for hook in adapter.hooks:
        hook.on_start(adapter, schedule)
    gradients = Gradients(adapter.parameters())
    meter = MemoryMeter(next(model.parameters()).device).start()
    for step in range(STEPS):
        for hook in adapter.hooks:
            hook.before_step(step)
        causal_loss(model, rows).backward()
        for point in ("after_backward", "before_optimizer"):
            for hook in adapter.hooks:
                getattr(hook, point)(step)
        adapter.optimizer.step()
        adapter.optimizer.zero_grad(set_to_none=True)
    peak = meter.stop()
    with fast_forms(model, plain):
        saved = kept(model, lambda: model.model(input_ids=rows["input_ids"], use_cache=False).last_hidden_state)
    return {
        "state": sum(bytes_of(v) for s in adapter.optimizer.state.values() for v in s.values()),
        "state formula": sum(formulas.state(label, tuple(p.shape)) for p in adapter.parameters() if p.requires_grad),
        "gradients": gradients.most,
        "largest gradient": max(p.numel() * p.element_size() for p in gradients.params),
        "kept": saved,
        "kept formula": kept_formula(label, adapter, formulas.Sizes.of(model.config, *shape)),
        "peak": peak,
    }


class Gradients:
    """Counts the bytes of the gradients that tensors hold as each one arrives; ``most`` is the most of them."""

    def __init__(self, params: list[Any]) -> None:
        self.params, self.most = params, 0
        for p in params:
            p.register_post_accumulate_grad_hook(self._note)

    def _note(self, arrived: Any) -> None:
        held = (p.grad.numel() * p.grad.element_size() for p in self.params if p.grad is not None)
        self.most = max(self.most, sum(held))


def bytes_of(value: Any) -> int:
    """Of a tensor of the optimiser's state, none of a plain number."""
    return value.numel() * value.element_size() if hasattr(value, "element_size") else 0


def kept_formula(label: str, adapter: Any, sizes: formulas.Sizes) -> int:
    """Bytes kept for backward by the method's formula; of the adapter it takes only what was drawn, and its fields."""
    deltas = list(adapter.every().values())
    if label in ("lora", "paca"):
        return getattr(formulas, label)(sizes, RANK)
    if label == "lst":
        return formulas.lst(sizes, deltas[0].reduction)
    if label == "sherl":
        return formulas.sherl(sizes, deltas[0].reduction, deltas[0].late)
    if label == "s2ft":
        columns = [[0, 0] for _ in range(sizes.blocks)]
        for d in deltas:
            columns[d.site.block][d.site.role == "down"] = len(d.indices)
        return formulas.s2ft(sizes, columns)
    trained = (d.site.block for d in deltas if any(p.requires_grad for p in d.parameters()))
    return formulas.written(sizes, set(trained))


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--case", choices=list(CASES), help="measure this one in this process and write --out")
    made.add_argument("--out", type=Path, help="where --case writes its JSON")
    made.add_argument("--only", nargs="+", choices=list(CASES), help="some of the cases")
    can_add(made)
    chosen = made.parse_args()
    if chosen.case:
        chosen.out.write_text(json.dumps(one(chosen.case, chosen.quick)), encoding="utf-8")
    else:
        main("memory", measure, chosen)
