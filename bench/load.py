"""Seconds to load the packaged GGUF model from the cache, in a fresh process that has imported torch and transformers.

``import transformers`` alone leaves the model's classes to be imported when they are first used: that, and importing
Veneer, counts here. The second figure has them imported before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from bench.harness import Report, alternate, figure, fresh, main, parser, ratios, repeats

MODEL = "smollm2-135m"


SIDES = ("veneer", "veneer-warm", "transformers")


def measure(options: argparse.Namespace) -> Report:
    """Veneer by turns with transformers' own loading of the converted folder; a first round fills the caches."""
    cases = {side: lambda side=side: fresh("bench.load", "--side", side)["seconds"] for side in SIDES}
    times = alternate(cases, repeats(options), warm_up=1)
    figures = [
        figure("packaged model from the cache", times["veneer"], "s", at_most=1.5),
        figure("the same, the model's classes imported before", times["veneer-warm"], "s"),
        figure("the same folder by transformers' from_pretrained", times["transformers"], "s"),
        figure("Veneer's time over transformers'", ratios(times["veneer"], times["transformers"]), "×"),
    ]
    return Report(figures, {"seconds": times}, {"model": MODEL})


def load(side: str) -> dict[str, Any]:
    """Load model and tokenizer once; gives the seconds."""
    import torch
    import transformers

    if side == "transformers":
        from veneer.models.gguf import converted
        from veneer.models.load import packaged_path
        from veneer.models.precision import precision

        dtype = precision(None, torch.device("cpu"))
        folder = converted(packaged_path(MODEL), dtype)
        began = time.perf_counter()
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        transformers.AutoTokenizer.from_pretrained(folder)
        return {"seconds": time.perf_counter() - began}
    if side == "veneer-warm":
        _ = transformers.LlamaForCausalLM, transformers.PreTrainedTokenizerFast
    began = time.perf_counter()
    import veneer

    veneer.load_model(MODEL, device="cpu")
    return {"seconds": time.perf_counter() - began}


def _arguments() -> argparse.ArgumentParser:
    made = parser(__doc__)
    for own in ("--side", "--out"):
        made.add_argument(own, help=argparse.SUPPRESS)
    return made


if __name__ == "__main__":
    options = _arguments().parse_args()
    if options.side:
        Path(options.out).write_text(json.dumps(load(options.side)), encoding="utf-8")
    else:
        main("load", measure, options)
