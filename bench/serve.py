"""Serving: tokens a second against the number of adapters, beside transformers' generate and PEFT's mixed batch.

SmolLM2-135M in bf16, adapters of rank 8 on q, k, v and o, as S-LoRA's; 16 requests at once of 32 prompt tokens and
32 new ones, all waiting from the start, adapters by S-LoRA's power law (0.3). The folder is made once, outside the
timed part; of N adapters each is registered, read and resident on its own, while their contents repeat after 64. The
latency run has gamma arrivals at 70 % of the measured rate.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import Report, alternate, figure, main, parser, ratios, repeats

MODEL, RANK, SITES = "smollm2-135m", 8, ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPT, OUTPUT, BATCH, DISTINCT, ALPHA, DEADLINE = 32, 32, 16, 64, 0.3, 6.0
COUNTS, QUICK_COUNTS = (1, 16, 128, 1000, 2000), (1, 16)
MEMORY = 1_200_000_000


def measure(options: argparse.Namespace) -> Report:
    """Tokens a second of every case by turns, then latencies."""
    import torch

    import veneer

    counts = QUICK_COUNTS if options.quick else COUNTS
    requests = BATCH if options.quick else 4 * BATCH
    folder = Path(tempfile.mkdtemp(prefix="veneer-bench-"))
    try:
        model, _ = veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")
        adapters(model, folder, max(counts))
        rows = prompts(requests)
        cases = {"transformers": lambda: transformers_rate(model, rows[:BATCH])}
        cases |= peft_cases(folder, rows[: 2 if options.quick else BATCH])
        trunk = base_trunk()
        engines = {n: engine_over(trunk, folder, n) for n in (0, *counts)}
        stats: dict[int, list[float]] = {n: [] for n in engines}
        for n, engine in engines.items():
            cases[f"{n} adapters"] = lambda n=n, engine=engine: served(engine, rows, n, stats[n])
        samples = alternate(cases, repeats(options), warm_up=0 if options.quick else 1)
        base = samples["0 adapters"]
        figures = [
            figure("engine without adapters over transformers", ratios(base, samples["transformers"]), at_least=1.2),
            figure(
                "16 adapters over PEFT's mixed batch", ratios(samples["16 adapters"], samples["peft mixed"]), at_least=5
            ),
        ]
        for n in counts:
            reach = {"at_least": 0.75} if n == 1000 else {}
            distinct = sum(stats[n]) / max(1, len(stats[n]))
            figures.append(
                figure(
                    f"{n} adapters over none",
                    ratios(samples[f"{n} adapters"], base),
                    note=f"{distinct:.1f} in a batch",
                    **reach,
                )
            )
        figures += [figure(name, taken, "tokens/s") for name, taken in samples.items()]
        figures += latencies(engines[counts[-1]], rows, counts[-1], samples[f"{counts[-1]} adapters"])
        figures += loading(engines[counts[-1]], counts)
        settings = {"model": MODEL, "rank": RANK, "sites": SITES, "batch": BATCH, "memory": MEMORY, "alpha": ALPHA}
        return Report(figures, samples, settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def adapters(model: Any, folder: Path, count: int) -> None:
    """PEFT folders ``a0`` …, hard links to ``DISTINCT`` different ones."""
    import torch
    from safetensors.torch import save_file

    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(SITES),
        "task_type": "CAUSAL_LM",
    }
    for n in range(count):
        own = folder / f"a{n}"
        own.mkdir()
        if n >= DISTINCT:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                os.link(folder / f"a{n % DISTINCT}" / name, own / name)
            continue
        g = torch.Generator().manual_seed(n)
        tensors = {}
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in SITES:
                out, inputs = module.weight.shape
                for name, shape, size in (("A", (RANK, inputs), inputs**-0.5), ("B", (out, RANK), 0.02)):
                    key = f"base_model.model.{path}.lora_{name}.weight"
                    tensors[key] = (torch.randn(shape, generator=g) * size).bfloat16()
        save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
        (own / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def prompts(count: int) -> list[list[int]]:
    """Random tokens."""
    import torch

    g = torch.Generator().manual_seed(0)
    return torch.randint(100, 40_000, (count, PROMPT), generator=g).tolist()


def generated(model: Any, rows: list[list[int]], **extra: Any) -> float:
    """Tokens a second of one batch by transformers' generate."""
    import torch

    ids = torch.tensor(rows)
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT,
            min_new_tokens=OUTPUT,
            do_sample=False,
            **extra,
        )
    return len(rows) * OUTPUT / (time.perf_counter() - began)


def transformers_rate(model: Any, rows: list[list[int]]) -> float:
    """The base in plain transformers."""
    return generated(model, rows)


def peft_cases(folder: Path, rows: list[list[int]]) -> dict[str, Any]:
    """PEFT with 16 adapters: all in one batch, and one after the other."""
    import torch
    from peft import PeftModel

    import veneer

    own, _ = veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")
    adapted = PeftModel.from_pretrained(own, str(folder / "a0"), adapter_name="a0")
    names = [f"a{n}" for n in range(BATCH)]
    available = [n for n in names if (folder / n).is_dir()]
    for name in available[1:]:
        adapted.load_adapter(str(folder / name), adapter_name=name)
    adapted.eval()

    def mixed() -> float:
        return generated(adapted, rows, adapter_names=[available[i % len(available)] for i in range(len(rows))])

    def switching() -> float:
        began = time.perf_counter()
        for i, row in enumerate(rows):
            adapted.set_adapter(available[i % len(available)])
            generated(adapted, [row])
        return len(rows) * OUTPUT / (time.perf_counter() - began)

    return {"peft mixed": mixed, "peft switching": switching}


def base_trunk() -> Any:
    """The base, made ready to serve, for all engines."""
    import torch

    import veneer
    from veneer.serve.trunk import Trunk

    return Trunk(veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")[0])


def engine_over(trunk: Any, folder: Path, count: int) -> Any:
    """An engine with ``count`` adapters registered."""
    from veneer.serve.engine import Engine, Limits

    limits = Limits(batch=BATCH, queue=10_000, chunk=512, reuse=False)
    engine = Engine(trunk, (MEMORY if count > 16 else MEMORY // 4) // trunk.page_bytes(), limits=limits)
    for n in range(count):
        engine.bank.add(f"a{n}", folder / f"a{n}")
    return engine


def asked(rows: list[list[int]], count: int, seed: int = 1) -> list[Any]:
    """A request for each row; adapters by the power law."""
    import numpy as np

    from veneer.serve.request import Request

    draw = np.random.RandomState(seed)
    chosen = (draw.power(ALPHA, len(rows)) * max(1, count)).astype(int)
    if count == BATCH:
        chosen = np.arange(len(rows)) % count  # sixteen different ones, as PEFT's batch has
    return [Request(row, ((f"a{n}", 1.0),) if count else (), OUTPUT) for row, n in zip(rows, chosen)]


def served(engine: Any, rows: list[list[int]], count: int, distinct: list[float]) -> float:
    """Tokens a second over all requests, waiting from the start; notes the adapters in a decoded batch."""
    before = (engine.totals.steps, engine.totals.adapters)
    requests = asked(rows, count, seed=len(distinct) + 1)
    began = time.perf_counter()
    for r in requests:
        engine.submit(r)
    engine.run()
    took = time.perf_counter() - began
    assert all(len(r.generated) == OUTPUT for r in requests)
    distinct.append((engine.totals.adapters - before[1]) / max(1, engine.totals.steps - before[0]))
    return len(rows) * OUTPUT / took


def latencies(engine: Any, rows: list[list[int]], count: int, rates: list[float]) -> list[Any]:
    """First-token latency under gamma arrivals at 70 % of what the engine bears."""
    import numpy as np

    rate = 0.7 * sorted(rates)[len(rates) // 2] / OUTPUT
    times = np.cumsum(np.random.RandomState(0).gamma(1.0, 1 / rate, len(rows)))
    requests = asked(rows, count, seed=99)
    began, nth = engine.clock(), 0
    while nth < len(requests) or engine.busy:
        while nth < len(requests) and times[nth] <= engine.clock() - began:
            requests[nth].arrival = began + times[nth]
            engine.submit(requests[nth])
            nth += 1
        if not engine.step():
            time.sleep(0.001)
    firsts = [r.first - r.arrival for r in requests]
    note = f"{count} adapters, {rate:.2f} requests/s"
    return [
        figure("first token, p50", float(np.percentile(firsts, 50)), "s", note=note),
        figure("first token, p95", float(np.percentile(firsts, 95)), "s", note=note),
        figure(f"within {DEADLINE:g} s", sum(f < DEADLINE for f in firsts) / len(firsts), note=note),
    ]


def loading(engine: Any, counts: tuple[int, ...]) -> list[Any]:
    """Time to load one adapter, with few and with many registered."""
    from veneer.serve.bank import Entry

    found = []
    folder = engine.bank.entries["a0"].folder
    for _ in range(10):
        began = time.perf_counter()
        engine.bank.loader.read(Entry("again", folder))
        found.append((time.perf_counter() - began) * 1e3)
    size = engine.bank.entries["a0"].size * engine.pool.page_bytes / 1e6
    return [figure("reading one adapter", found, "ms", note=f"{size:.2f} MB, {counts[-1]} registered")]


if __name__ == "__main__":
    main("serve", measure, parser(__doc__).parse_args())
