"""Starts of the factors on all 210 linear layers: seconds and memory, Veneer's and PEFT's, and how exact PiSSA's is.

Every run is a process of its own. The time is that of attaching with the start, less that of attaching plain LoRA in
the same round: what is left is the start alone. The memory is the largest anonymous memory while attaching over what
stood before, so the adapter is in it, and for starts that look at data a forward or backward pass. Both sides work on
the same bf16 weights, read into memory before the clock starts, and on the same batches.

In pieces, each of a minute or two: ``--only`` takes some starts, ``--sides`` one side, ``--what`` times or errors
alone, ``--add`` keeps what the last result holds besides, ``--more`` adds rounds to those of the same starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness import Figure, Report, alternate, figure, fresh, main, parser, refuse, repeats, say, seconds
from bench.pieces import can_add, earlier
from veneer.errors import UserError

MODEL, RANK, VOCABULARY = "smollm2-135m", 16, 49152
FAST = "pissa_niter_4"  # PEFT's name
CALIBRATION, QUICK_CALIBRATION = (4, 4, 128), (2, 2, 32)  # batches, rows, tokens of the starts that look at data
QUICK_SITES = 7  # compared with the exact decomposition: one block's
QUICK_BLOCKS = r"model\.layers\.[01]\..*_proj"
BLOCKS = r"model\.layers\..*_proj"  # PEFT's CorDA and LoRA-GA do not know "all-linear" while they look at data


class Start(NamedTuple):
    """A start on both sides: Veneer's recipe, and PEFT's name for it where PEFT has it; ``most`` bounds our seconds."""

    title: str
    recipe: str
    peft: str | None = None
    most: float | None = None


STARTS = {
    "pissa": Start("PiSSA", "lora+pissa", FAST, 1.0),
    "pissa-exact": Start("PiSSA, exact", "lora+pissa(exact=True)", "pissa"),
    "olora": Start("OLoRA", "lora+olora", "olora"),
    "eva": Start("EVA", "lora+eva", "eva"),
    "corda-ipm": Start("CorDA, for the task", "lora+corda(mode='ipm')", "corda-ipm"),
    "corda-kpm": Start("CorDA, keeping knowledge", "lora+corda(mode='kpm')", "corda-kpm"),
    "lora-ga": Start("LoRA-GA", "lora+lora-ga", "lora_ga"),
    "lora-sb": Start("LoRA-SB", "lora-xs+lora-sb"),
    "nlora": Start("NLoRA", "slora+nlora"),
    "slora": Start("StructuredLoRA", "slora"),
    "inttune": Start("IntTune", "inttune"),
    "loftq": Start("LoftQ with its quantisation", "lora+nf4+loftq"),  # PEFT's runs on CUDA alone
}
SIDES = {"veneer": "Veneer", "peft": "PEFT"}
PLAIN = Start("plain LoRA", "lora", "plain")


def measure(options: argparse.Namespace) -> Report:
    """Every start by turns, each side's against that side's plain LoRA of the same round."""
    settings = {"model": MODEL, "dtype": "bfloat16", "rank": RANK, "quick": options.quick}
    settings["calibration"] = "{} batches of {} × {} tokens".format(*_shape(options.quick))
    samples = earlier("starts", settings) if options.add or options.more else {}
    chosen = options.only or list(STARTS)
    if options.what != "errors":
        runs = alternate(_cases(chosen, options.sides, options.quick), repeats(options))
        for name in chosen:
            found = samples.setdefault(name, {})
            for side in (s for s in SIDES if f"{s} {name}" in runs):
                before = found.get(side, {}) if options.more else {}
                both = {"start": runs[f"{side} {name}"], "plain": runs[f"{side} plain"]}
                found[side] = {what: before.get(what, []) + new for what, new in both.items()}
    if options.what != "times" and "pissa" in chosen:
        samples["errors"] = _errors(QUICK_SITES if options.quick else None)
    figures = [line for name in STARTS if name in samples for line in _figures(STARTS[name], samples[name])]
    for side, found in samples.get("errors", {}).items():
        count = len(found["subspace"])
        for kind, words in (("subspace", "subspace error"), ("excess", "excess error")):
            worst = f"median of {count} layers, largest {max(found[kind]):.2g}"
            figures.append(figure(f"PiSSA, {words}, {side}", statistics.median(found[kind]), note=worst))
    return Report(figures, samples, settings)


def _cases(chosen: list[str], sides: list[str], quick: bool) -> dict[str, Callable[[], dict[str, float]]]:
    cases: dict[str, Callable[[], dict[str, float]]] = {}
    both = any(STARTS[n].peft is not None for n in chosen)
    for name, start in {"plain": PLAIN, **{n: STARTS[n] for n in chosen}}.items():
        if "veneer" in sides:
            cases[f"veneer {name}"] = lambda name=name: _process("veneer", name, quick)
        if "peft" in sides and both and start.peft is not None:
            cases[f"peft {name}"] = lambda name=name: _process("peft", name, quick)
    return cases


def _figures(start: Start, found: dict[str, dict[str, list[dict[str, float]]]]) -> list[Figure]:
    """Seconds over plain LoRA's of the round, and memory, of each side."""
    lines = []
    for side, runs in found.items():
        took = [run["seconds"] - plain["seconds"] for run, plain in zip(runs["start"], runs["plain"], strict=True)]
        bound = {"at_most": start.most} if side == "veneer" and start.most else {}
        note = start.recipe if side == "veneer" else str(start.peft)
        lines.append(figure(f"{start.title}, {SIDES[side]}", took, "s", note=note, **bound))
        memory = [run["memory"] / 2**20 for run in runs["start"]]
        lines.append(figure(f"{start.title}, {SIDES[side]}, memory", memory, "MB"))
    return lines


def _shape(quick: bool) -> tuple[int, int, int]:
    return QUICK_CALIBRATION if quick else CALIBRATION


def _process(side: str, name: str, quick: bool) -> dict[str, float]:
    found = fresh("bench.starts", "--side", side, "--start", name, *(["--quick"] if quick else []))
    say(f"{side} {name}: {found['seconds']:.2f} s, {found['memory'] / 2**20:.0f} MB")
    return found


# -- one run, in its own process ---------------------------------------------------------------------------------------


def run(side: str, name: str, quick: bool) -> dict[str, float]:
    """Seconds of attaching, and bytes of anonymous memory at its peak over those before it."""
    import torch

    import veneer
    from veneer.train.record import MemoryMeter

    start, batches, model = {"plain": PLAIN, **STARTS}[name], _batches(*_shape(quick)), _model()
    if side == "veneer":
        veneer.methods()  # the catalogue's files are read once, before the clock
        sites = f"re:^{QUICK_BLOCKS}$" if quick else "linear"

        def work() -> object:
            return veneer.attach(model, start.recipe, rank=RANK, sites=sites, calibration=batches)
    else:
        import peft.tuners.lora.corda  # noqa: F401 - imports are not part of what is timed

        def work() -> object:
            return _by_peft(model, str(start.peft), batches, QUICK_BLOCKS if quick else BLOCKS)

    meter = MemoryMeter(torch.device("cpu"), every=0.005).start()
    before = meter.read()
    took = seconds(work)
    return {"seconds": took, "memory": meter.stop() - before}


def _model() -> Any:
    """The model with its weights in memory of its own, so that no run pays for reading them."""
    import torch

    import veneer

    model, _ = veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _batches(count: int, rows: int, width: int) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(0, VOCABULARY, (count, rows, width), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in ids]


def _by_peft(model: Any, start: str, batches: list[dict[str, Any]], targets: str = BLOCKS) -> Any:
    """PEFT's model with one of its starts, by the steps that its documentation gives."""
    import torch
    from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights, preprocess_loraga

    torch.manual_seed(0)  # PEFT draws from the global generator
    facts = {"r": RANK, "lora_alpha": RANK, "target_modules": targets}
    if start == "eva":
        made = get_peft_model(model, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **facts))
        initialize_lora_eva_weights(made, batches, show_progress_bar=False)
        return made
    if start == "lora_ga":
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **facts)

        def step() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, step)
        return get_peft_model(model, config)
    if start.startswith("corda"):
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        corda = CordaConfig(corda_method=start.removeprefix("corda-"))
        config = LoraConfig(init_lora_weights="corda", corda_config=corda, **facts)

        def look() -> None:  # it takes batches of one row
            for batch in batches:
                for row in batch["input_ids"]:
                    model(input_ids=row[None])

        preprocess_corda(model, config, run_model=look)
        return get_peft_model(model, config)
    return get_peft_model(model, LoraConfig(init_lora_weights=True if start == "plain" else start, **facts))


# -- how exact ---------------------------------------------------------------------------------------------------------


def _errors(limit: int | None) -> dict[str, dict[str, list[float]]]:
    """By side, for each layer (or the first ``limit``), how far the started pair is from the best one of its rank.

    ``subspace``: root mean square of the sines of the angles between the span of B and the leading left singular
    vectors. ``excess``: ‖W − s·BA‖_F over the least that any rank-r matrix leaves, less one.
    """
    import torch

    import veneer
    from veneer.numerics.svd import subspace_error

    adapter = veneer.attach(_model(), "lora+pissa", rank=RANK)
    pairs = {site.path: (A.detach(), B.detach(), float(scale)) for site, A, B, scale in adapter.pairs()}
    peft = _by_peft(_model(), FAST, [])
    theirs = {
        path.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach().float(),
            layer.lora_B["default"].weight.detach().float(),
            layer.scaling["default"],
        )
        for path, layer in peft.named_modules()
        if hasattr(layer, "lora_A")
    }
    sides = {"Veneer": pairs, f"PEFT {FAST}": theirs}
    found: dict[str, dict[str, list[float]]] = {side: {"subspace": [], "excess": []} for side in sides}
    for site in adapter.sites[:limit]:
        W = site.weight().float()
        U, S, _ = torch.linalg.svd(W, full_matrices=False)
        least = torch.linalg.vector_norm(S[RANK:])
        for side, started in sides.items():
            A, B, scale = started[site.path]
            span = torch.linalg.qr(B).Q
            found[side]["subspace"].append(float(subspace_error(span, U[:, :RANK])))
            found[side]["excess"].append(float(torch.linalg.matrix_norm(W - scale * B @ A) / least - 1))
    return found


def _arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=list(STARTS), help="some of the starts")
    made.add_argument("--what", choices=("times", "errors", "both"), default="both", help="what to measure")
    made.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="one side alone, or both")
    made.add_argument(
        "--more", action="store_true", help="as --add, and keep earlier rounds of the same starts as well"
    )
    can_add(made)
    for own in ("--side", "--start", "--out"):
        made.add_argument(own, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    options = _arguments().parse_args()
    if options.side:
        try:
            result = run(options.side, options.start, options.quick)
        except UserError as error:
            refuse(str(error))
        Path(options.out).write_text(json.dumps(result), encoding="utf-8")
    else:
        main("starts", measure, options)
