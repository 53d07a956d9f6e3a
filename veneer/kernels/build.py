"""Compiles the C files beside it into one shared library, once for each machine, and loads it.

The library lies in the cache (``$VENEER_CACHE``, else ``~/.cache/veneer``) under a name made of its sources, the
compiler and its flags; its last bytes are the digest of those before, since a library cut short would crash when it is
loaded. It runs on the threads of torch's own OpenMP: it is linked to none, and finds the symbols of the one that torch
has loaded for all.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from veneer import cache

SOURCES = Path(__file__).parent
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma")
FLAGS = ["-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += [f"-m{name.replace('_', '')}" for name in FEATURES]
CPUINFO = Path("/proc/cpuinfo")
SECONDS = 120  # within which a compiler must be done
SWITCH = "VENEER_KERNELS"
DIGEST = hashlib.sha256().digest_size  # bytes


class Missing(Exception):
    """Why there are no compiled kernels here, as the end of a sentence."""


def load(sources: Path = SOURCES) -> ctypes.CDLL:
    """The library of the C files in ``sources``, compiled now if it is not whole in the cache.

    Raises:
        Missing: it is turned off, the processor lacks what it needs or has something better, there is no C compiler
            that can make it, or what was made does not load.
    """
    if os.environ.get(SWITCH) == "0":
        raise Missing(f"they are turned off by {SWITCH}=0")
    _fitting_processor()
    compiler, macros = _compiler()
    made = _place(sources, compiler, macros)
    try:
        if not _whole(made):
            _compile(compiler, sources, made)
    except OSError as error:
        raise Missing(
            f"the cache {made.parent} cannot be used ({error.strerror}); name another folder in VENEER_CACHE"
        ) from None
    try:
        return ctypes.CDLL(str(made))  # every symbol is looked up now: without GNU's OpenMP this fails, not a call
    except OSError as error:
        raise Missing(f"the compiled library does not load ({error})") from None


def _fitting_processor() -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise Missing("they are written for x86-64 processors under Linux")
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise Missing(f"{CPUINFO}, which says what the processor can do, is not readable ({error.strerror})") from None
    flags = set(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
    if not flags.issuperset(FEATURES):
        raise Missing(
            f"the processor has no products of bf16 vectors (it lacks {', '.join(sorted({*FEATURES} - flags))})"
        )
    if "amx_bf16" in flags:
        raise Missing("the processor multiplies bf16 matrices in tiles (AMX), which torch uses and they do not")


def _compiler() -> tuple[list[str], str]:
    """The command of a GNU compiler, whose OpenMP is torch's, and its macros: ``$CC`` if it is set, else gcc or cc."""
    chosen = os.environ.get("CC")
    try:
        commands = [shlex.split(chosen)] if chosen and chosen.strip() else [["gcc"], ["cc"]]
    except ValueError:
        raise Missing(f"CC={chosen} is no command; unset CC, or name gcc in it") from None
    for command in commands:
        ask = [*command, "-dM", "-E", "-x", "c", os.devnull]
        try:
            macros = subprocess.run(ask, capture_output=True, text=True, errors="replace", timeout=SECONDS).stdout
        except (OSError, subprocess.TimeoutExpired):
            continue
        if "__GNUC__" in macros and "__clang__" not in macros and "__INTEL_COMPILER" not in macros:
            return command, macros
    if len(commands) == 1:
        raise Missing(f"CC={chosen} is no GNU C compiler; unset CC, or name gcc in it")
    raise Missing("no GNU C compiler was found; install gcc, and training is faster")


def _place(sources: Path, compiler: list[str], macros: str) -> Path:
    digest = hashlib.sha256("\0".join((*compiler, macros, *FLAGS)).encode())
    for source in sorted(sources.glob("*.[ch]")):
        digest.update(b"\0" + source.name.encode() + b"\0" + source.read_bytes())
    try:
        return cache.folder("kernels") / f"veneer-{digest.hexdigest()[:16]}.so"
    except RuntimeError:
        raise Missing("there is no home folder for the cache; name a folder in VENEER_CACHE") from None


def _whole(made: Path) -> bool:
    if not made.is_file():
        return False
    content = made.read_bytes()
    return hashlib.sha256(content[:-DIGEST]).digest() == content[-DIGEST:]


def _compile(compiler: list[str], sources: Path, made: Path) -> None:
    """Write ``made`` whole or not at all, whatever other processes do meanwhile."""
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=made.parent) as folder:
        # Compiled and linked apart: one call with -fopenmp would link a second OpenMP.
        each = {source: str(Path(folder) / f"{source.stem}.o") for source in sorted(sources.glob("*.c"))}
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    _run,
                    ([*compiler, *FLAGS, "-c", str(source), "-o", object_file] for source, object_file in each.items()),
                )
            )
        draft = Path(folder) / made.name
        _run([*compiler, "-shared", *each.values(), "-lm", "-o", str(draft)])
        content = draft.read_bytes()
        draft.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(draft, made)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except OSError as error:
        raise Missing(f"{command[0]} does not run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise Missing(f"{command[0]} was not done after {SECONDS} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines() or ["?"]
        raise Missing(f"{command[0]} could not compile them ({lines[0].strip()[:200]}); a gcc from 10 on should")
