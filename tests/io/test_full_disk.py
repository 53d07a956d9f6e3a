"""A disk that fills up at any byte, or a death at any step, leaves the old adapter, the new one, or a plain refusal."""

import os
import random
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from by_peft import run, shake
from models import make

import veneer
from veneer.errors import UserError
from veneer.io.native import contents

FORMS = ("native", "peft", "peft-lora", "merged")
STEPS = (("replace", os), ("link", os), ("rename", os), ("fsync", os), ("unlink", Path))


def write(form, adapter, directory):
    options = {"batches": ()} if form == "peft-lora" else {}
    return adapter.save(directory) if form == "native" else adapter.export(directory, form, **options)


def outputs(form, directory):
    """What the directory gives on a fresh base."""
    case = make("llama")
    if form == "merged":
        from transformers import AutoModelForCausalLM

        return run(AutoModelForCausalLM.from_pretrained(directory), case.batch)
    veneer.load(case.model, directory)
    return run(case.model, case.batch)


def content(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@contextmanager
def full_at(size):
    """No file grows beyond ``size`` bytes: the kernel's stand-in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_is_full_at_any_byte_leaves_what_was_there(form, tmp_path):
    case = make("llama")
    adapter = veneer.attach(case.model, "lora(rank=4)")
    write(form, adapter, tmp_path / "d")
    before, draw = content(tmp_path / "d"), random.Random(0)
    largest = max(map(len, before.values()))
    shake(case.model)
    for size in [0, largest - 1, *(draw.randrange(largest) for _ in range(2))]:
        for place in ("d", "new"):
            with full_at(size), pytest.raises(UserError, match="cannot write"):
                write(form, adapter, tmp_path / place)
        assert content(tmp_path / "d") == before
        assert [p.name for p in tmp_path.iterdir()] == ["d"]
    write(form, adapter, tmp_path / "d")
    torch.testing.assert_close(outputs(form, tmp_path / "d"), run(case.model, case.batch), rtol=1e-5, atol=1e-5)


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def failing(monkeypatch, at, error):
    """The ``at``-th of the steps that put files in place fails; gives the count of steps taken."""
    taken = [0]

    def stepping(real):
        def step(*args, **kwargs):
            taken[0] += 1
            if taken[0] == at:
                raise error
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name, owner in STEPS:
            patch.setattr(owner, name, stepping(getattr(owner, name)))
        yield taken


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_fails_or_a_death_at_any_of_them_never_mixes_two_versions(form, tmp_path, monkeypatch):
    case = make("llama")
    adapter = veneer.attach(case.model, "lora(rank=4)")
    shake(case.model, 0.1)
    write(form, adapter, tmp_path / "old")
    adapter.detach()
    adapter = veneer.attach(case.model, "rslora(rank=2, alpha=5)")
    shake(case.model, 0.1)
    write(form, adapter, tmp_path / "new")
    old, new = content(tmp_path / "old"), content(tmp_path / "new")
    with failing(monkeypatch, 0, None) as taken:
        shutil.copytree(tmp_path / "old", tmp_path / "d")
        write(form, adapter, tmp_path / "d")
    killed = set()
    for at in range(1, taken[0] + 1):
        for error in (OSError(28, "No space left on device"), Killed()):
            shutil.rmtree(tmp_path / "d")
            shutil.copytree(tmp_path / "old", tmp_path / "d")
            try:
                with failing(monkeypatch, at, error):
                    write(form, adapter, tmp_path / "d")
            except UserError:
                left = content(tmp_path / "d")
                assert left == old or {k: v for k, v in left.items() if k in new} == new, at
            except Killed:
                killed.add(_reads(form, tmp_path, old, new))
    assert "old" in killed and "new" in killed


def _reads(form, folder, old, new):
    """Which version a reader finds after a death: by the bytes, where no file says what another must be."""
    there = content(folder / "d")
    if form == "native":
        _, state = contents(folder / "d")
        kept = {n: contents(folder / n)[1] for n in ("old", "new")}
        return next(
            n for n, s in kept.items() if s.keys() == state.keys() and all(torch.equal(s[k], state[k]) for k in s)
        )
    if not {Path("adapter_config.json"), Path("config.json")} & there.keys():
        with pytest.raises((UserError, OSError, ValueError)):
            outputs(form, folder / "d")
        return "none"
    version = {k: v for k, v in there.items() if k in old}
    return next(n for n, known in (("old", old), ("new", new)) if version == {k: known[k] for k in old})
