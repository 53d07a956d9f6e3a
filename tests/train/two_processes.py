"""A run on the processes it was launched on; the first prints the losses and the trained vector as JSON.

``data``: ``fit``. ``ddp``: the user's own loop around DistributedDataParallel. ``shard-first`` and ``attach-first``:
``fit`` on a model under torch's fully_shard, sharded before or after the adapter is attached. ``broken``: sharded, with
a folder (the second argument's), stopped by a signal to the first process after two steps, and resumed. ``sum RECIPE``:
``fit`` with that recipe (`sums`); ``alike RECIPE``: how far the trained vectors of the two are apart after it.
``tasks``: ``fit`` of ABMLL on batches of two tasks, one a process.
"""

import json
import os
import signal
import sys

import sums
import torch
from small_runs import collated, encoded, llama

STEPS, SIZE = 4, 4
TASKS = "gaussian-lora(noise='weight', log_variance=-3.0)+abmll(inner_steps=2)"


def attached(model):
    import veneer

    return veneer.attach(model, "lora", rank=4)


def by_fit(adapter, out=None, **changes):
    from veneer.train.loop import fit

    given = {"batch_size": SIZE, "accumulate": 2, "lr": 1e-2, "clip": 0.1, "precision": "fp32", "display": False}
    given |= {"eval_data": encoded(5, 2), "steps": STEPS}
    run = fit(adapter, encoded(29), out, **given | changes)
    return {"losses": run.losses, "held_out": run.held_out}


def by_tasks(adapter):
    """Counting by two and by three are tasks; rows of both alternate, as ``Episodes`` has them."""
    from veneer.train.loop import fit

    starts, step = torch.arange(8), torch.tensor([2, 3]).repeat(4)
    rows = [1 + (starts[:, None] + 8 * n + step[:, None] * torch.arange(10)) % 60 for n in range(2 * STEPS)]
    batches = [{"input_ids": ids, "labels": ids, "task": step} for ids in rows]
    given = {"steps": STEPS, "accumulate": 2, "lr": 1e-2, "precision": "fp32", "display": False}
    return {"losses": fit(adapter, batches, **given).losses}


def by_ddp(adapter):
    """Each process takes every second row; the gradient is of the mean over the rows of both."""
    from torch.nn.parallel import DistributedDataParallel

    from veneer.train.loss import LossModule

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    wrapped = DistributedDataParallel(LossModule(adapter.model.train()))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for batch in collated(encoded(16), SIZE):
        mine = {k: v[rank::world] for k, v in batch.items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        loss = wrapped(mine, reduction="sum") * world / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.distributed.all_reduce(loss.detach_())
        losses.append(float(loss) / world)
    return {"losses": losses}


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def stopped(out):
    """Two steps of a run, and what it said when it stopped."""
    from veneer.train.display import Silent
    from veneer.train.interrupt import Interrupted

    class Stop(Silent):
        def step(self, values):
            if values["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    adapter = attached(llama())
    sharded(adapter.model)
    try:
        by_fit(adapter, out, display=Stop())
    except Interrupted as stop:
        return stop.code
    return None


def outcome(kind, out):
    if kind.startswith("sum "):
        adapter = sums.attached(kind.removeprefix("sum "))
        return by_fit(adapter, steps=sums.STEPS, eval_data=None) | {"vector": vector(adapter)}
    if kind.startswith("alike "):
        adapter = sums.attached(kind.removeprefix("alike "))
        by_fit(adapter, steps=sums.STEPS, eval_data=None)
        mine = adapter.vector()
        other = mine.clone()
        torch.distributed.all_reduce(other)
        return {"apart": float((other - 2 * mine).abs().max()), "size": len(mine)}
    if kind == "tasks":
        adapter = sums.attached(TASKS)
        return by_tasks(adapter) | {"vector": vector(adapter)}
    model = llama()
    if kind == "shard-first":
        model = sharded(model)
    adapter = attached(model)
    if kind in ("attach-first", "broken"):
        sharded(model)
    if kind == "broken":
        assert stopped(out) == 128 + signal.SIGTERM
        found = by_fit(adapter, out, resume=True)
        return found | {"vector": vector(adapter)}
    found = by_ddp(adapter) if kind == "ddp" else by_fit(adapter)
    return found | {"vector": vector(adapter)}


def vector(adapter):
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in adapter.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in full]).tolist()


def main(out, kinds):
    from accelerate import PartialState

    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    found = {kind: outcome(kind, out) for kind in kinds} | {"world": state.num_processes}
    if state.is_main_process:
        print(json.dumps(found), flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
