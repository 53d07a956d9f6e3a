"""Two processes over gloo reach the losses of one with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import collated, encoded, llama
from two_processes import SIZE, attached, by_fit

import veneer

HERE = Path(__file__).parent
PROGRAM = str(HERE / "two_processes.py")


def environment(**more):
    path = os.pathsep.join([str(HERE), *[p for p in sys.path if p]])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def answer(done):
    out, err, code = done
    assert code == 0, err[-3000:]
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def one():
    adapter = attached(llama())
    return by_fit(adapter) | {"vector": adapter.vector().tolist()}


def agree(found, one):
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert torch.allclose(torch.tensor(found["vector"]), torch.tensor(one["vector"]), atol=1e-5)


def test_data_parallel_under_accelerate_launch(one):
    """``accelerate launch --cpu`` starts one process; the second comes as on a second machine, by RANK."""
    port = free_port()
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    fixed = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]
    ranks = []
    for rank in ("0", "1"):
        known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [*launch, *fixed, "--num_cpu_threads_per_process", "1", PROGRAM, "-", "data", "ddp"]
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(command, env=environment(**known), stdout=pipe, stderr=pipe, text=True))
    ends = [(*p.communicate(timeout=200), p.returncode) for p in ranks]
    found = answer(ends[0])
    assert found["world"] == 2
    agree(found["data"], one)
    assert [loss for _, loss in found["data"]["held_out"]] == pytest.approx([v for _, v in one["held_out"]], rel=1e-5)
    assert found["ddp"]["losses"] == pytest.approx(plain_losses(), rel=1e-5)


def plain_losses():
    adapter = attached(llama())
    adapter.model.train()
    optimizer, losses = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0), []
    for batch in collated(encoded(16), SIZE):
        loss = veneer.causal_loss(adapter.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_fully_sharded_under_torchrun_attached_before_and_after(one, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [*command, PROGRAM, str(tmp_path / "run"), "attach-first", "broken", "shard-first"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
    )
    found = answer((done.stdout, done.stderr, done.returncode))
    assert found["world"] == 2
    for kind in ("attach-first", "broken", "shard-first"):
        agree(found[kind], one)
    saved = veneer.load(llama(), tmp_path / "run" / "adapter")
    assert torch.equal(saved.vector(), torch.tensor(found["broken"]["vector"]))
