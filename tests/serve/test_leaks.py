"""An hour of traffic (ten minutes but for one policy) on a model that only answers: every page is accounted for."""

import random

import pytest
import torch
from tiny import MODELS

from veneer.errors import UserError
from veneer.serve.engine import Engine, Limits
from veneer.serve.layout import Layout, Piece, Place
from veneer.serve.policies.catalogue import POLICIES
from veneer.serve.request import Request
from veneer.serve.route import Packed
from veneer.serve.simulate import gamma_power
from veneer.serve.trunk import Trunk


class Files:
    """Adapters without files: ranks by number; every seventh cannot be read."""

    def __init__(self, groups):
        self.groups = groups

    def packed(self, folder, size, dtype):
        number = int(folder.name)
        if number % 7 == 6:
            raise UserError(f"{folder} is damaged")
        rank = (4, 8, 16)[number % 3]
        pieces = {Place("o", 0, 32): Piece(torch.zeros(2, rank, 32), torch.zeros(2, 32, rank))}
        layout = Layout.of(pieces, self.groups)
        return Packed(layout, layout.pack(pieces, size, dtype), "lora", rank)


def accounted(engine):
    own = [p for r in engine.running for p in r.pages]
    shared = set(engine.prefixes._users)
    adapters = [p for e in (*engine.bank.entries.values(), *engine.bank.old) for p in e.pages]
    assert len(adapters) == len(set(adapters)) and not shared & set(adapters)
    return len(set(own) | shared) + len(adapters)


@pytest.mark.parametrize("name", POLICIES)
def test_long_traffic_leaks_no_page(name, tmp_path):
    random.seed(0)
    now = [0.0]
    trunk = Trunk(MODELS["llama"]())
    engine = Engine(
        trunk,
        120,
        tokens=4,
        policy=POLICIES[name](),
        limits=Limits(batch=6, chunk=32),
        threaded=False,
        reader=Files(trunk.groups),
        clock=lambda: now[0],
    )
    rows = torch.randn(64, 89)
    engine.trunk.logits = lambda batch, plan, pool: rows[
        : batch.tokens.shape[0] if batch.asked is None else len(batch.asked)
    ]
    for number in range(30):
        engine.bank.add(str(number), tmp_path / str(number))
    duration = 3600 if name == "fair" else 600
    trace = gamma_power(30, 0.5, rate=0.5, cv=4, duration=duration, lengths=(1, 40), seed=1)
    requests, nth, minute = [], 0, 0
    while nth < len(trace) or engine.busy:
        while nth < len(trace) and trace[nth].time <= now[0]:
            a = trace[nth]
            prompt = [(a.adapter + i) % 50 for i in range(a.inputs)]
            requests.append(Request(prompt, ((str(a.adapter), 1.0),), a.outputs, arrival=now[0]))
            engine.submit(requests[-1])
            nth += 1
        if random.random() < 0.02 and requests:
            engine.cancel(random.choice(requests[-8:]))
        if random.random() < 0.01 and engine.running:
            engine.preempt(random.choice(engine.running))
        if random.random() < 0.01:
            engine.bank.add("3", tmp_path / "3")
        moved = engine.step()
        now[0] += 0.3 if moved else 0.5
        if now[0] // 60 > minute:
            minute = now[0] // 60
            assert accounted(engine) == engine.pool.used
    assert all(r.reason is not None for r in requests) and not engine.bank.old
    for number in range(30):
        engine.bank.evict(str(number))
    engine.prefixes.evict(10_000)
    assert engine.pool.free == 120
