"""Serving: tokens a second against the number of adapters, beside transformers' generate, PEFT and llama.cpp.

SmolLM2-135M in bf16, adapters of rank 8 on q, k, v and o, as S-LoRA's; requests of 32 prompt tokens and 32 new ones, 16
at once, all waiting from the start, adapters by S-LoRA's power law (0.3). The folder is made once, outside the timed
part, and kept (``--folder``); of N adapters each is registered, read and resident on its own, while their contents
repeat after 64. ``--part`` runs one of the parts, each of less than three minutes, and writes ``serve-PART.json``:

- base: this engine without adapters over transformers' generate, the same 16 requests;
- peft: 16 requests with 16 adapters over PEFT's mixed batch and over PEFT switching;
- scale: 1, 16 and 1,000 adapters over none, 64 requests; counts: 128 and 2,000;
- latency: first tokens under gamma arrivals at 70 % of the measured rate, with 1,000 adapters;
- loading: reading one adapter, by its bytes and by how many are registered;
- memory: what ``--check`` promises against what a fresh process takes, all pages written;
- llama: beside llama.cpp's server with a LoRA for each request, where there is one (bench/serve_outside.py);
- gguf: our GGUF files in llama.cpp, its log-probabilities against ours;
- vllm: exports read by vLLM's own reader, where it imports.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.harness import Report, alternate, figure, fresh, main, parser, ratios, repeats, say
from bench.serve_adapters import MODEL, OUTPUT, RANK, SITES, make, prompts, shapes, write_adapter
from bench.serve_outside import gguf, llama, vllm

BATCH, ALPHA, DEADLINE = 16, 0.3, 6.0
MOST, CHUNK = 2000, 512
MEMORY = 1_200_000_000
RESIDENT = {"rank 8": ((8,), 1_200_000_000), "ranks 4 to 64": ((4, 8, 16, 32, 64), 500_000_000)}
KINDS = ("promised", "taken")
FOLDER = Path(tempfile.gettempdir()) / "veneer-bench-serve"
SETTINGS = {"model": MODEL, "rank": RANK, "sites": SITES, "batch": BATCH, "memory": MEMORY, "alpha": ALPHA}


def measure(options: argparse.Namespace) -> Report:
    """The parts asked for, one after the other."""
    found = Report([], {}, dict(SETTINGS))
    names = [options.part] if options.part else list(PARTS)
    make(options.folder, QUICK if options.quick else MOST)
    for name in names:
        say(f"serve: {name}")
        figures, samples = PARTS[name](options)
        found.figures += figures
        found.samples[name] = samples
    return found


def base(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """This engine without adapters and transformers' generate."""
    rows = prompts(BATCH)
    engine = engine_over(base_trunk(), options.folder, 0)
    cases = {"transformers": transformers_case(rows), "0 adapters": lambda: served(engine, rows, 0, [])}
    samples = alternate(cases, repeats(options), warm_up=1)
    over = ratios(samples["0 adapters"], samples["transformers"])
    figures = [figure("engine without adapters over transformers", over, at_least=1.2)]
    return figures + [figure(name, taken, "tokens/s") for name, taken in samples.items()], samples


def peft(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Sixteen different adapters in one batch, here and with PEFT."""
    rows = prompts(4 if options.quick else BATCH)
    engine = engine_over(base_trunk(), options.folder, BATCH)
    cases = peft_cases(options.folder, rows) | {"16 adapters": lambda: served(engine, rows, BATCH, [])}
    samples = alternate(cases, options.repeats or (1 if options.quick else 3), warm_up=0 if options.quick else 1)
    own = samples["16 adapters"]
    figures = [
        figure("16 adapters over PEFT's mixed batch", ratios(own, samples["peft mixed"]), at_least=5),
        figure("16 adapters over PEFT switching", ratios(own, samples["peft switching"])),
    ]
    return figures + [figure(name, taken, "tokens/s") for name, taken in samples.items()], samples


def scale(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """1, 16 and 1,000 adapters against none."""
    return against_none(options, (1, 16) if options.quick else (1, 16, 1000))


def counts(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """128 and 2,000 adapters against none."""
    return against_none(options, (8,) if options.quick else (128, 2000))


def against_none(options: argparse.Namespace, numbers: tuple[int, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Engines with so many adapters and one without, by turns."""
    rows = prompts(BATCH if options.quick else 4 * BATCH)
    trunk = base_trunk()
    engines = {n: engine_over(trunk, options.folder, n) for n in (0, *numbers)}
    stats: dict[int, list[float]] = {n: [] for n in engines}
    cases = {f"{n} adapters": lambda n=n: served(engines[n], rows, n, stats[n]) for n in engines}
    samples = alternate(cases, options.repeats or (1 if options.quick else 3), warm_up=0 if options.quick else 1)
    figures = []
    for n in numbers:
        reach = {"at_least": 0.75} if n == 1000 else {}
        note = f"{sum(stats[n]) / len(stats[n]):.1f} different ones in a batch"
        over = ratios(samples[f"{n} adapters"], samples["0 adapters"])
        figures.append(figure(f"{n} adapters over none", over, note=note, **reach))
    return figures + [figure(name, taken, "tokens/s") for name, taken in samples.items()], samples


def latency(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """First tokens while requests come at 70 % of what the engine bears."""
    count = QUICK if options.quick else 1000
    rows = prompts(BATCH if options.quick else 12 * BATCH)
    engine = engine_over(base_trunk(), options.folder, count)
    rate = [served(engine, rows[: 4 * BATCH], count, []) for _ in range(2)][-1]
    return latencies(engine, rows, count, [rate]), {"tokens/s before": rate}


def loading(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Time to read one adapter: few and many registered, and by its bytes."""
    from veneer.serve.bank import Entry

    trunk, found, samples = base_trunk(), [], {}

    def reading(engine: Any, folder: Path) -> tuple[list[float], float]:
        taken, size = [], 0.0
        for _ in range(12):
            began = time.perf_counter()
            loaded = engine.bank.loader.read(Entry("again", folder))
            taken.append((time.perf_counter() - began) * 1e3)
            loaded.packed.done()
            size = loaded.packed.layout.numel * engine.pool.page_bytes / engine.pool.size / 1e6
        return taken[2:], size

    for count in (8, QUICK if options.quick else MOST):
        engine = engine_over(trunk, options.folder, count)
        for _ in range(min(count, BATCH)):
            engine.submit(asked([[5, 6, 7]], 0)[0])
        engine.run()
        taken, size = reading(engine, options.folder / "a0")
        samples[f"{count} registered"] = taken
        found.append(figure(f"reading one of {count:,} adapters", taken, "ms", note=f"{size:.2f} MB"))
    for rank in (8, 16, 32, 64):
        folder = options.folder / f"rank{rank}"
        if not folder.is_dir():
            write_adapter(shapes(trunk.model), folder, rank, 0)
        taken, size = reading(engine, folder)
        samples[f"rank {rank}"] = taken
        found.append(figure(f"reading rank {rank}, for a MB", [t / size for t in taken], "ms", note=f"{size:.2f} MB"))
    return found, samples


def memory(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Promised in one process and taken in another, for two pools and two sets of ranks."""
    figures, samples = [], {}
    for name in ("rank 8",) if options.quick else RESIDENT:
        found = {kind: fresh("bench.serve", "--resident", kind, "--of", name, *folder(options)) for kind in KINDS}
        promised, taken = (found[kind]["bytes"] for kind in KINDS)
        note = f"{taken / 1e6:,.0f} of {promised / 1e6:,.0f} MB promised; pool {RESIDENT[name][1] / 1e9:g} GB"
        figures.append(
            figure(f"{name}: growth over the promise, from 1", abs(taken / promised - 1), at_most=0.05, note=note)
        )
        samples[name] = found
    return figures, samples


def folder(options: argparse.Namespace) -> tuple[str, str]:
    """The option again, for another process."""
    return "--folder", str(options.folder)


def resident(options: argparse.Namespace) -> None:
    """Write what `--check` promises, or what a server took when all its pages were written, to ``--out``."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from veneer.serve.check import check
    from veneer.serve.mapped import resident as now
    from veneer.serve.sizes import keep_few

    keep_few()
    x = torch.randn(512, 512)
    torch.nn.functional.linear(x.bfloat16(), x.bfloat16())  # what the libraries take for themselves
    ranks, room = RESIDENT[options.of]
    root = options.folder if len(ranks) == 1 else mixed_ranks(options.folder, ranks)
    before = now()
    trunk = base_trunk()
    pages = room // trunk.page_bytes()
    if options.resident == "promised":
        plan = check(trunk, root, pages, BATCH, CHUNK)
        content = {"bytes": plan.total_bytes, "base": plan.weight_bytes, "steps": plan.work_bytes}
    else:
        engine = engine_over(trunk, root, QUICK, reuse=True, room=room)
        draw = torch.Generator().manual_seed(0)
        while engine.pool.free > pages // 100:
            lengths = torch.randint(20, 480, (BATCH,), generator=draw).tolist()
            rows = [torch.randint(100, 40_000, (n,), generator=draw).tolist() for n in lengths]
            for request in asked(rows, QUICK):
                engine.submit(request)
            engine.run()
        content = {"bytes": now() - before, "adapters": engine.bank.resident}
    Path(options.out).write_text(json.dumps(content), encoding="utf-8")


def mixed_ranks(root: Path, ranks: tuple[int, ...]) -> Path:
    """A folder of adapters of these ranks by turns, made when it is not there."""
    import torch

    import veneer

    made = root.with_name(root.name + "-ranks")
    if not (made / f"a{QUICK - 1}").is_dir():
        found = shapes(veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")[0])
        for n in range(QUICK):
            write_adapter(found, made / f"a{n}", ranks[n % len(ranks)], n)
    return made


PARTS = {f.__name__: f for f in (base, peft, scale, counts, latency, loading, memory, llama, gguf, vllm)}
QUICK = 16


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


def transformers_case(rows: list[list[int]]) -> Any:
    """The base in plain transformers."""
    import torch

    import veneer

    model, _ = veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")
    return lambda: generated(model, rows)


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
        for i, row in enumerate(rows[:2]):  # each takes as long as another
            adapted.set_adapter(available[i % len(available)])
            generated(adapted, [row])
        return len(rows[:2]) * OUTPUT / (time.perf_counter() - began)

    return {"peft mixed": mixed, "peft switching": switching}


def base_trunk() -> Any:
    """The base, made ready to serve, for all engines."""
    import torch

    import veneer
    from veneer.serve.sizes import keep_few
    from veneer.serve.trunk import Trunk

    keep_few()
    return Trunk(veneer.load_model(MODEL, dtype=torch.bfloat16, device="cpu")[0])


def engine_over(trunk: Any, folder: Path, count: int, reuse: bool = False, room: int | None = None) -> Any:
    """An engine with ``count`` adapters registered, and ``room`` bytes of pool."""
    from veneer.serve.engine import Engine, Limits

    limits = Limits(batch=BATCH, queue=10_000, chunk=CHUNK, reuse=reuse)
    room = room or (MEMORY if count > BATCH else MEMORY // 4)
    engine = Engine(trunk, room // trunk.page_bytes(), limits=limits)
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


def arguments() -> argparse.Namespace:
    """What the command line says."""
    made = parser(__doc__)
    made.add_argument("--part", choices=list(PARTS), help="only this part, into serve-PART.json")
    made.add_argument("--folder", type=Path, default=FOLDER, help=f"where the adapters are kept; {FOLDER}")
    made.add_argument("--resident", choices=KINDS, help=argparse.SUPPRESS)
    made.add_argument("--of", choices=list(RESIDENT), help=argparse.SUPPRESS)
    made.add_argument("--out", help=argparse.SUPPRESS)
    return made.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.resident:
        resident(given)
    else:
        main(f"serve-{given.part}" if given.part else "serve", measure, given)
