"""A run that is killed again and again: run as a program, it prints what became of it as JSON.

One process imports everything and forks a child for each attempt, so that a kill costs no import.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

STEPS, KILLS = 48, 5


def train(out, resume=True):
    import torch
    from small_runs import encoded, llama

    import veneer
    from veneer.train.loop import fit

    torch.set_num_threads(1)
    model = llama(attention_dropout=0.1)
    adapter = veneer.attach(model, "lora", rank=4, dropout=0.1)
    fit(
        adapter,
        encoded(40),
        out,
        eval_data=encoded(8, 2),
        batch_size=4,
        accumulate=2,
        lr=1e-2,
        steps=STEPS,
        eval_every=7,
        save_every=2,
        precision="fp32",
        resume=resume,
        display=False,
    )


def child(out):
    """Fork a child that trains; gives its process number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        train(out)
        status = 0
    finally:
        os._exit(status)


def steps_logged(out):
    log = out / "run.jsonl"
    return len(log.read_bytes().splitlines()) if log.exists() else 0


def last_checkpoint(out):
    return max([int(p.name.split("-")[1]) for p in out.glob("checkpoint-*")], default=0)


def kill_somewhere(number, out, chance):
    """Kill the child in its start, or some steps after where it takes up, between two lines of its log."""
    target = last_checkpoint(out) + chance.randint(0, 9)
    while target and steps_logged(out) < target and not os.waitpid(number, os.WNOHANG)[0]:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03 if target else 0.3))
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)


def main(folder, seed):
    import accelerate
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    from small_runs import llama

    import veneer.report.plots
    import veneer.train.loop  # noqa: F401

    llama()
    accelerate.PartialState()
    chance = random.Random(seed)
    whole, broken = Path(folder, "whole"), Path(folder, "broken")
    assert os.waitpid(child(whole), 0)[1] == 0
    reached = []
    for _ in range(KILLS):
        kill_somewhere(child(broken), broken, chance)
        reached.append(last_checkpoint(broken))
    unfinished = not json.loads((broken / "run.json").read_text())["finished"]
    assert os.waitpid(child(broken), 0)[1] == 0
    same = [
        Path(whole, "adapter", n).read_bytes() == Path(broken, "adapter", n).read_bytes()
        for n in ("adapter.safetensors", "recipe.json")
    ]
    losses = [
        [json.loads(line).get("loss") for line in (p / "run.jsonl").read_text().splitlines()] for p in (whole, broken)
    ]
    found = {"unfinished": unfinished, "reached": reached, "same": all(same), "losses": losses[0] == losses[1]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
