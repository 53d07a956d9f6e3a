"""Compiled kernels are made once, whole, on torch's own threads, or not used and the reason said."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch

from veneer import kernels
from veneer.kernels import build
from veneer.train import precision

PROBE = """
#include <omp.h>
__attribute__((visibility("default"))) int team(int threads) {
    int seen = 0;
    #pragma omp parallel num_threads(threads) reduction(+:seen)
    seen += 1;
    return seen;
}
"""


def hindrance() -> str:
    """Why nothing can be compiled here, or an empty string."""
    try:
        build._fitting_processor()
        build._compiler()
    except build.Missing as why:
        return str(why)
    return ""


compiles = pytest.mark.skipif(bool(hindrance()), reason=hindrance() or "it compiles")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "probe.c").write_text(PROBE)
    return folder


@pytest.fixture
def compilations(monkeypatch):
    seen, compile = [], build._compile
    monkeypatch.setattr(build, "_compile", lambda *given: seen.append(given) or compile(*given))
    return seen


def python(code: str, **changes: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "2"} | changes
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


@compiles
def test_a_second_load_does_not_compile(cache, sources, compilations):
    assert build.load(sources).team(2) == 2
    assert build.load(sources).team(2) == 2
    assert len(compilations) == 1 and len(list(cache.iterdir())) == 1


@compiles
def test_other_sources_make_another_library(cache, sources, compilations):
    build.load(sources)
    (sources / "probe.c").write_text(PROBE.replace("seen += 1", "seen += 3"))
    assert build.load(sources).team(2) == 6
    assert len(compilations) == 2


@compiles
@pytest.mark.parametrize("left", [0, 10, 0.3, 0.9])
def test_a_library_cut_short_is_made_anew(cache, sources, compilations, left):
    build._compile(build._compiler()[0], sources, build._place(sources, *build._compiler()))
    (made,) = cache.iterdir()
    content = made.read_bytes()
    made.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    assert build.load(sources).team(2) == 2
    assert len(compilations) == 2 and build._whole(made)


@compiles
def test_what_does_not_compile_leaves_nothing_and_says_the_first_error(cache, sources):
    (sources / "wrong.c").write_text("int f(void) { return nonsense; }\n")
    with pytest.raises(build.Missing, match=r"wrong\.c:1:.*nonsense"):
        build.load(sources)
    assert list(cache.iterdir()) == []


@compiles
def test_a_cache_that_cannot_be_written_is_named(sources, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.Missing, match=r"VENEER_CACHE"):
        build.load(sources)


@compiles
def test_two_processes_may_compile_at_once(cache, sources):
    code = f"""
from pathlib import Path; from veneer.kernels import build; import torch
print(build.load(Path({str(sources)!r})).team(2))"""
    both = [python(code) for _ in range(2)]
    assert [p.communicate(timeout=120)[0].strip() for p in both] == ["2", "2"]
    assert len(list(cache.iterdir())) == 1


@compiles
def test_torch_and_the_kernels_share_one_openmp(cache, sources):
    code = f"""
import torch; from pathlib import Path; from veneer.kernels import build
torch.ones(1000, 1000).sum(); build.load(Path({str(sources)!r})).team(2)
mapped = {{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}}
print(*mapped, sep="\\n")"""
    found = python(code).communicate(timeout=120)[0].split()
    assert len(found) == 1 and "/torch" in found[0] and "libgomp" in found[0]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({build.SWITCH: "0"}, "turned off by VENEER_KERNELS=0"),
        pytest.param({"CC": "/nonexistent"}, "CC=/nonexistent is no GNU C compiler; unset CC", marks=compiles),
    ],
)
def test_without_kernels_torch_does_the_work_and_the_reason_is_said(changes, said, cache):
    code = """
import torch; from veneer import kernels; from veneer.numerics.lowrank import Branch, Factors, run
x, W = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(6, 8, dtype=torch.bfloat16)
A, B = torch.ones(2, 8), torch.ones(6, 2)
branches = [Branch(W, A=A, B=B)]
assert not kernels.usable(x) and kernels.library() is None
print(run(x, branches, Factors.of(branches, x.dtype))[0][0].unique().tolist(), kernels.state())"""
    out = python(code, **changes).communicate(timeout=120)[0]
    assert out.startswith("[24.0] compiled kernels are not used: ") and said in out
    assert not cache.exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("avx2 fma", "no products of bf16 vectors"),
        (" ".join([*build.FEATURES, "amx_bf16"]), r"tiles \(AMX\)"),
    ],
)
@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="not Linux")
def test_a_processor_that_does_not_fit_is_told(flags, said, tmp_path, monkeypatch, cache):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "CPUINFO", tmp_path / "cpuinfo")
    build.CPUINFO.write_text(f"processor : 0\nflags : {flags}\n")
    with pytest.raises(build.Missing, match=said):
        build.load()


@pytest.mark.parametrize("command", ["'", "true", "/nonexistent --flag"])
def test_a_compiler_that_is_none_is_refused(command, monkeypatch):
    monkeypatch.setenv("CC", command)
    with pytest.raises(build.Missing, match="unset CC"):
        build._compiler()


def test_no_compiler_at_all_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.Missing, match="install gcc"):
        build._compiler()


@pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
def test_clang_whose_openmp_is_another_is_refused(monkeypatch):
    monkeypatch.setenv("CC", "clang")
    with pytest.raises(build.Missing, match="no GNU C compiler"):
        build._compiler()


def test_only_plain_rows_on_the_cpu_are_usable(monkeypatch):
    monkeypatch.setattr(kernels, "_library", ctypes.CDLL(None))
    monkeypatch.setattr(kernels, "_why", "")
    x = torch.ones(3, 4)
    mapped, fake = [], torch._subclasses.FakeTensorMode().from_tensor(x)
    torch.vmap(lambda row: (mapped.append(kernels.usable(row)), row)[1])(x)
    torch.func.grad(lambda y: (mapped.append(kernels.usable(y)), y.sum())[1])(x)
    assert kernels.usable() and kernels.usable(x, torch.nn.Parameter(x), x[:, :2], x[0])
    assert [kernels.usable(y) for y in (x.t(), x.to("meta"), x.to_sparse(), fake)] == [False] * 4
    assert mapped == [False, False]


def test_nothing_is_usable_while_torch_compiles(monkeypatch):
    monkeypatch.setattr(kernels, "_library", ctypes.CDLL(None))
    monkeypatch.setattr(kernels, "_why", "")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.usable(torch.ones(3, 4))


def test_a_library_is_asked_for_once(monkeypatch):
    asked = []

    def refuse():
        asked.append(1)
        raise build.Missing("of the test")

    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(kernels, "_why", None)
    monkeypatch.setattr(build, "load", refuse)
    assert not kernels.usable() and not kernels.usable() and kernels.state().endswith(": of the test")
    assert len(asked) == 1


@pytest.mark.parametrize(
    "dtype, device, said", [("bfloat16", "cpu", True), ("float32", "cpu", False), ("bfloat16", "cuda", False)]
)
def test_a_run_speaks_of_kernels_where_they_could_be(dtype, device, said):
    words = precision._kernels(getattr(torch, dtype), torch.device(device))
    assert words == (f"; {kernels.state()}" if said else "")
