"""Starts of LoRA's factors on all 210 linear layers: seconds, and how far a fast decomposition is from the exact one.

Each time is that of attaching with the start, of which plain attaching (zero B), measured just before, is taken off:
what is left is the start alone. Both sides work on the same bf16 weights, read into memory before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from bench.harness import Report, alternate, figure, main, parser, repeats, seconds

MODEL, RANK, VOCABULARY = "smollm2-135m", 16, 49152
FAST, EXACT = "pissa_niter_4", "pissa"  # PEFT's names
CALIBRATION, QUICK_CALIBRATION = (4, 4, 128), (1, 2, 32)  # batches, rows, tokens of the starts that look at data
QUICK_SITES = 7  # compared with the exact decomposition: one block's


def measure(options: argparse.Namespace) -> Report:
    """PiSSA by Veneer and by PEFT, exact and randomised; Veneer's EVA and LoRA-GA where they are registered."""
    import peft  # noqa: F401 - its import is not part of what is timed

    import veneer

    shape = QUICK_CALIBRATION if options.quick else CALIBRATION
    batches = _batches(*shape)
    known = {method.name for method in veneer.methods()}
    looking = {name: title for name, title in {"eva": "EVA", "lora-ga": "LoRA-GA"}.items() if name in known}
    cases = {f"lora+{name}": lambda name=name: _ours(f"lora+{name}", batches) for name in ("pissa", *looking)}
    cases |= {f"peft {name}": lambda name=name: _theirs(name) for name in (FAST, EXACT)[: 1 if options.quick else 2]}
    samples = alternate(cases, repeats(options), warm_up=0 if options.quick else 1)

    def alone(name: str) -> list[float]:
        return [run["whole"] - run["plain"] for run in samples[name]]

    def whole(name: str) -> list[float]:
        return [run["whole"] for run in samples[name]]

    figures = [
        figure("PiSSA start, Veneer", alone("lora+pissa"), "s", at_most=1.0),
        figure("attaching with it, Veneer", whole("lora+pissa"), "s"),
        figure("PiSSA start, PEFT, randomised", alone(f"peft {FAST}"), "s", note=FAST),
        figure("attaching with it, PEFT", whole(f"peft {FAST}"), "s"),
    ]
    if f"peft {EXACT}" in samples:
        figures.append(figure("PiSSA start, PEFT, exact", alone(f"peft {EXACT}"), "s"))
    batch = "{} batches of {} × {} tokens".format(*shape)
    figures += [
        figure(f"{title} start, Veneer", alone(f"lora+{name}"), "s", note=batch) for name, title in looking.items()
    ]
    errors = _errors(QUICK_SITES if options.quick else None)
    for side, found in errors.items():
        count = len(found["subspace"])
        for kind, words in (("subspace", "subspace error"), ("excess", "excess error")):
            worst = f"median of {count} layers, largest {max(found[kind]):.2g}"
            figures.append(figure(f"{words}, {side}", statistics.median(found[kind]), note=worst))
    return Report(figures, {"seconds": samples, "errors": errors}, {"model": MODEL, "dtype": "bfloat16", "rank": RANK})


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
    return [{"input_ids": part, "labels": part} for part in ids]


def _ours(recipe: str, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of attaching plain LoRA, and of attaching the recipe."""
    import veneer

    def took(recipe: str) -> float:
        model = _model()
        return seconds(lambda: veneer.attach(model, recipe, rank=RANK, calibration=batches))

    return {"plain": took("lora"), "whole": took(recipe)}


def _theirs(start: str) -> dict[str, float]:
    def took(start: str | bool) -> float:
        model = _model()
        return seconds(lambda: _by_peft(model, start))

    return {"plain": took(True), "whole": took(start)}


def _by_peft(model: Any, start: str | bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)  # PEFT draws from the global generator
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=start)
    return get_peft_model(model, config)


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
    peft = _by_peft(_model(), FAST)
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


if __name__ == "__main__":
    main("starts", measure, parser(__doc__).parse_args())
