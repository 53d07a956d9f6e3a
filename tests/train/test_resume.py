"""Broken runs go on bit for bit; damaged, foreign and busy folders are refused or passed over with a word."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import encoded, llama

import veneer
from veneer.train import checkpoint
from veneer.train.display import Silent
from veneer.train.folder import RunFolder
from veneer.train.interrupt import Interrupted
from veneer.train.loop import fit


class Broken(Exception):
    pass


class Break(Silent):
    """Notes what is said and breaks the run after a number of steps."""

    def __init__(self, after=None):
        self.after, self.said = after, []

    def step(self, values):
        if values["step"] == self.after:
            raise Broken

    def event(self, text):
        self.said.append(text)


SETTINGS = {"batch_size": 4, "lr": 1e-2, "steps": 12, "save_every": 4, "precision": "fp32"}


def run(out, recipe="lora", after=None, resume=False, data=None, watch=None, prepare=None, **changes):
    model = llama(attention_dropout=0.1)
    calibration = [{"input_ids": torch.arange(1, 41).view(2, 20), "labels": torch.arange(1, 41).view(2, 20)}]
    rank = None if recipe == "full" else 4
    adapter = veneer.attach(model, recipe, rank=rank, calibration=calibration)
    if prepare is not None:
        prepare(adapter)
    watch = watch or Break(after)
    try:
        fit(adapter, data or encoded(40), out, resume=resume, display=watch, **SETTINGS | changes)
    except Broken:
        return watch, None
    return watch, {k: v.clone() for k, v in adapter.state().items()}


def two_phases(adapter):
    """Half the run trains B alone; then one site is dropped and another gets rank 2."""
    from veneer.core.hook import Hook, Phase

    class TwoPhases(Hook):
        name = "two-phases"

        def phases(self):
            return [Phase("find", 0.5, ("B",)), Phase("train", 0.5)]

        def on_phase_end(self, phase):
            first, second, *_ = adapter.deltas
            return {first: None, second: {"rank": 2}} if phase.name == "find" else None

    adapter.hooks.append(TwoPhases())
    adapter.start_phase()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_an_unbroken_one(tmp_path):
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(here / "killed_runs.py"), str(tmp_path), "11"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["reached"]) >= 5 and found["unfinished"] and max(found["reached"]) > 0
    assert found["same"] and found["losses"]


@pytest.mark.parametrize(
    "recipe",
    [
        "lora(dropout=0.1)",
        "dora+pissa",
        "full",
        "lora+sora",
        "lora+lora-pro+ba-lora",
        "lora+nf4",
        "increlora",
        "galore",
    ],
)
@pytest.mark.parametrize("after", [6, 9])
def test_every_kind_of_state_survives_a_break(tmp_path, recipe, after):
    _, whole = run(tmp_path / "whole", recipe)
    run(tmp_path / "broken", recipe, after=after)
    watch, resumed = run(tmp_path / "broken", recipe, resume=True)
    assert any("going on from" in s for s in watch.said)
    assert equal(whole, resumed)


@pytest.mark.parametrize("after", [5, 6, 7, 11])
def test_phases_and_plans_survive_a_break(tmp_path, after):
    _, whole = run(tmp_path / "whole", prepare=two_phases)
    run(tmp_path / "broken", after=after, prepare=two_phases, save_every=1)
    _, resumed = run(tmp_path / "broken", resume=True, prepare=two_phases, save_every=1)
    assert equal(whole, resumed)
    assert sorted(v.shape[0] for k, v in whole.items() if k.endswith(".A")) == [2] + 12 * [4]


def test_early_stopping_keeps_its_count_and_its_best_over_a_break(tmp_path):
    more = {"eval_data": encoded(8, 2), "eval_every": 2, "early_stopping": 3, "lr": 0.3, "steps": 60, "save_every": 1}
    _, whole = run(tmp_path / "whole", **more)
    stopped = json.loads((tmp_path / "whole" / "run.json").read_text())["steps"]
    assert 5 < stopped < 60
    run(tmp_path / "broken", after=stopped - 1, **more)
    _, resumed = run(tmp_path / "broken", resume=True, **more)
    assert equal(whole, resumed)
    assert json.loads((tmp_path / "broken" / "run.json").read_text())["steps"] == stopped


def test_a_shuffling_loader_goes_on_where_it_was(tmp_path):
    from veneer.data import Collator

    def loader():
        return torch.utils.data.DataLoader(encoded(40), batch_size=4, shuffle=True, collate_fn=Collator(0))

    _, whole = run(tmp_path / "whole", data=loader())
    run(tmp_path / "broken", data=loader(), after=7)
    _, resumed = run(tmp_path / "broken", data=loader(), resume=True)
    assert equal(whole, resumed)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    _, whole = run(tmp_path / "whole")
    run(tmp_path / "broken", after=10)
    weights = tmp_path / "broken" / "checkpoint-8" / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    watch, resumed = run(tmp_path / "broken", resume=True)
    assert any("checkpoint-8 is damaged" in s and "hash" in s for s in watch.said)
    assert any("going on from" in s and "checkpoint-4" in s for s in watch.said)
    assert equal(whole, resumed)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "adapter/adapter.safetensors"])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, name):
    run(tmp_path / "broken", after=10)
    for path in (tmp_path / "broken").glob("checkpoint-*"):
        (path / name).write_bytes((path / name).read_bytes()[:-7])
    watch, state = run(tmp_path / "broken", resume=True)
    assert any("starting from the beginning" in s for s in watch.said)
    assert equal(state, run(tmp_path / "whole")[1])


def test_resume_without_a_run_starts_one_with_a_word(tmp_path):
    watch, state = run(tmp_path / "new", resume=True)
    assert any("starting from the beginning" in s for s in watch.said)
    assert state is not None


def test_resume_of_a_finished_run_does_nothing_and_gives_its_adapter(tmp_path):
    _, whole = run(tmp_path / "run")
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "run.lock"}
    watch, state = run(tmp_path / "run", resume=True)
    assert any("nothing to do" in s for s in watch.said)
    assert equal(whole, state)
    assert files == {p: p.stat().st_mtime_ns for p in files}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"recipe": "rslora"}, "recipe was 'lora\\(rank=4\\)' and is 'rslora"),
        ({"data": encoded(41)}, "data has changed"),
        ({"lr": 1e-3}, "lr was 0.01 and is 0.001"),
    ],
)
def test_resume_with_something_else_is_refused_and_says_what(tmp_path, changes, said):
    run(tmp_path / "run", after=6)
    with pytest.raises(veneer.UserError, match=said):
        run(tmp_path / "run", resume=True, **changes)


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path):
    run(tmp_path / "run", after=6)
    with pytest.raises(veneer.UserError, match=r"holds a run already \(last checkpoint: checkpoint-4\)"):
        run(tmp_path / "run")


def test_a_folder_that_is_being_written_to_is_refused(tmp_path):
    busy = RunFolder(tmp_path / "run", resume=False)
    with pytest.raises(veneer.UserError, match=f"being written to by process {os.getpid()}"):
        run(tmp_path / "run", resume=True)
    busy.close()
    run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_exits_with_a_sentence(tmp_path, number, status):
    class Signal(Break):
        def step(self, values):
            if values["step"] == 6:
                os.kill(os.getpid(), number)

    watch, before = Signal(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="checkpoint-6: resume goes on from there") as stopped:
        run(tmp_path / "run", watch=watch)
    assert stopped.value.code == status
    assert signal.getsignal(signal.SIGTERM) == before
    assert equal(run(tmp_path / "run", resume=True)[1], run(tmp_path / "whole")[1])


def test_a_run_that_could_not_begin_leaves_no_folder(tmp_path):
    with pytest.raises(veneer.UserError, match="no labels"):
        run(tmp_path / "run", data=[{"input_ids": [1, 2]}])
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path / "run", save_every=1, save_total=3)
    assert sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-11",
        "checkpoint-9",
    ]


def test_no_file_of_a_run_is_a_pickle(tmp_path):
    run(tmp_path / "run", after=6)
    kinds = {p.suffix for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".png", ".lock"}


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    import errno

    import safetensors.torch

    from veneer.io import files

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real, calls = safetensors.torch.save_file, []

    def fills_up(*arguments, **named):
        calls.append(1)
        return (full if len(calls) > 3 else real)(*arguments, **named)

    monkeypatch.setattr(files, "save_file", fills_up)
    with pytest.raises(veneer.UserError, match="No space left on device"):
        run(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-4"]
    monkeypatch.setattr(files, "save_file", real)
    assert equal(run(tmp_path / "run", resume=True)[1], run(tmp_path / "whole")[1])


def test_state_lies_in_memory_as_torch_lays_it(tmp_path):
    """A product of the same matrix at another offset sums in another order, which no resumed run may."""
    made = {f"{k}": torch.randn(3, 5 + k) for k in range(8)} | {"one": torch.ones(1, dtype=torch.uint8)}
    checkpoint.write_state(tmp_path, "optimizer", made)
    found = checkpoint.read_state(tmp_path, "optimizer")
    assert all(torch.equal(found[k], v) for k, v in made.items())
    assert {v.data_ptr() % 64 for v in made.values()} == {v.data_ptr() % 64 for v in found.values()} == {0}
