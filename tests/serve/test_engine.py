"""Greedy output in a mixed batch is transformers' generate with that adapter alone, token for token."""

import copy

import pytest
import torch
from tiny import FORMS, greedy, prompts

from veneer.serve.engine import Engine, Limits
from veneer.serve.request import Request
from veneer.serve.sizes import filled
from veneer.serve.trunk import Trunk

NAMES = [*FORMS, None]


def engine_of(written, pages=1500, **options):
    base, root, _ = written
    options.setdefault("threaded", False)
    engine = Engine(Trunk(copy.deepcopy(base)), pages, tokens=4, **options)
    for name in FORMS:
        engine.bank.add(name, root / name)
    return engine


def asked(texts, limit=12, names=NAMES):
    return [
        Request(p, () if (name := names[i % len(names)]) is None else ((name, 1.0),), limit)
        for i, p in enumerate(texts)
    ]


def expected(written, request):
    base, _, adapted = written
    model = adapted[request.blend[0][0]] if request.blend else base
    return greedy(model, request.prompt, request.limit)


def same(written, requests):
    for r in requests:
        assert r.generated == expected(written, r), r.blend


@pytest.mark.parametrize(("chunk", "fills"), [(7, False), (64, False), (64, True)])
def test_a_mixed_batch_generates_what_each_adapter_generates_alone(written, chunk, fills):
    engine = engine_of(written, limits=Limits(chunk=chunk))
    if fills:  # as on a CPU whose library compiles for every number of rows
        engine.trunk.filled, engine.trunk.packs = filled, True
    requests = asked(prompts(12))
    for r in requests:
        engine.submit(r)
    engine.run()
    same(written, requests)
    assert engine.pool.free + engine.prefixes.idle + sum(e.size for e in engine.bank.entries.values()) == 1500


def test_a_pool_too_small_for_all_adapters_evicts_and_reloads(written):
    whole = engine_of(written)
    for name in FORMS:
        whole.bank.take([name], 0.0)
    whole.bank.settle(0.0)
    sizes = [e.size for e in whole.bank.entries.values()]
    engine = engine_of(written, pages=2 * max(sizes) + 2, limits=Limits(batch=2))
    assert sum(sizes) > engine.pool.pages
    requests = asked(prompts(18, seed=1), limit=6)
    for r in requests:
        engine.submit(r)
    engine.run()
    same(written, requests)
    assert engine.bank.evictions > 0 and engine.bank.loads > len(FORMS)


def test_a_request_put_back_goes_on_after_its_adapter_left_and_came_again(written):
    engine = engine_of(written, limits=Limits(reuse=False))
    requests = asked(prompts(6, seed=2), limit=16)
    for r in requests:
        engine.submit(r)
    for _ in range(8):
        engine.step()
    for r in list(engine.running):
        engine.preempt(r)
    for name in FORMS:
        engine.bank.evict(name)
    assert engine.pool.used == 0
    engine.run()
    same(written, requests)


def test_common_beginnings_are_computed_once_per_adapter(written):
    engine = engine_of(written)
    start = prompts(1, seed=3, shortest=30)[0]
    for turn in range(2):
        requests = asked([start + [5 + turn, 7, 9]] * len(NAMES))
        for r in requests:
            engine.submit(r)
        engine.run()
        same(written, requests)
        assert all(r.reused == (len(start) // 4 * 4 if turn else 0) for r in requests)


def test_blended_adapters_are_the_sum_of_their_weighted_changes(written):
    base, _, adapted = written
    blend = (("lora4", 0.7), ("dora16", 0.5))
    mixed = copy.deepcopy(base)
    own = dict(base.named_parameters())
    for name, weight in blend:
        folded = copy.deepcopy(adapted[name])
        next(iter(folded.__dict__["_veneer"].adapters.values())).bake()
        other = dict(folded.named_parameters())
        with torch.no_grad():
            for n, p in mixed.named_parameters():
                p += weight * (other[n] - own[n])
    engine = engine_of(written)
    requests = [Request(p, blend, 12) for p in prompts(3, seed=4)]
    for r in requests:
        engine.submit(r)
    engine.run()
    assert [r.generated for r in requests] == [greedy(mixed, r.prompt, 12) for r in requests]


def test_a_new_version_serves_new_requests_while_old_ones_finish_on_theirs(written):
    _, root, adapted = written
    engine = engine_of(written)
    first, second = (Request(prompts(1, seed=5)[0], (("lora4", 1.0),), 12) for _ in range(2))
    engine.submit(first)
    engine.step()
    engine.bank.add("lora4", root / "dora16")
    engine.submit(second)
    engine.run()
    assert first.generated == greedy(adapted["lora4"], first.prompt, 12)
    assert second.generated == greedy(adapted["dora16"], second.prompt, 12)
    assert not engine.bank.old


def test_every_page_comes_back_when_requests_are_given_up_at_any_time(written):
    engine = engine_of(written, limits=Limits(batch=4, reuse=False))
    requests = asked(prompts(20, seed=6), limit=20)
    for number, r in enumerate(requests):
        engine.submit(r)
        engine.step()
        if number % 2:
            engine.cancel(requests[number - 1])
    engine.run()
    for name in FORMS:
        engine.bank.evict(name)
    assert engine.pool.used == 0
    assert {r.reason for r in requests} <= {"length", "cancelled"}
