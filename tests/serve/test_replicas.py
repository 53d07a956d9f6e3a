"""Several replicas: who answers whom, and on a local Ray cluster that it works from end to end."""

import collections
import importlib.util
import socket

import httpx
import pytest
from test_process import ASK, folders  # noqa: F401

from veneer.serve.routing import adapter_of, choose, home

NAMES = [f"adapter-{n}" for n in range(1000)]


def test_adapters_spread_evenly_and_stay_where_they_are():
    first = [choose(name, [0, 0, 0, 0]) for name in NAMES]
    assert first == [choose(name, [3, 5, 1, 8]) for name in NAMES]
    assert all(190 < n < 310 for n in collections.Counter(first).values())


def test_one_replica_more_moves_only_the_adapters_that_it_gets():
    before, after = ([home(name, count)[0] for name in NAMES] for count in (4, 5))
    moved = [b for a, b in zip(before, after) if a != b]
    assert set(moved) == {4} and 140 < len(moved) < 260


def test_a_busy_replica_passes_its_adapters_on():
    name = "popular"
    own, second, _ = home(name, 3)
    loads = [0, 0, 0]
    loads[own] = 8
    assert choose(name, loads, spread=8) == own
    loads[own] = 9
    assert choose(name, loads, spread=8) == second


def test_the_base_goes_where_least_is_to_do():
    assert choose(None, [4, 2, 3]) == 1


def test_a_blend_goes_where_its_first_adapter_is():
    assert adapter_of("b*0.3+a*0.7") == adapter_of("a*0.5 + b") == "a" and adapter_of(None) is None


@pytest.fixture(scope="module")
def cluster(folders):  # noqa: F811
    """The address of two replicas on a cluster of this machine."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip('Ray is not installed (pip install "veneer[ray]"), and replicas are its work')
    import ray
    from ray import serve

    from veneer.serve.app import Settings
    from veneer.serve.replicas import deploy
    from veneer.serve.start import Start

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base, adapters = folders
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, object_store_memory=80_000_000)
    start = Start(str(base), memory=0.01, batch=4, queue=8, threads=1)
    deploy(start, Settings("base", adapters, "s3cret", drain=2), 2, "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.timeout(900)
def test_two_replicas_answer_alike_and_each_adapter_keeps_to_one(cluster):
    with httpx.Client(base_url=cluster, headers={"Authorization": "Bearer s3cret"}, timeout=300) as client:
        assert httpx.get(cluster + "/v1/models", timeout=300).status_code == 401
        assert {m["id"] for m in client.get("/v1/models").json()["data"]} == {"base", "lora8"}
        answers = [client.post("/v1/completions", json=ASK) for _ in range(4)]
        assert {r.status_code for r in answers} == {200}
        assert {r.headers["x-veneer-replica"] for r in answers} == {str(home("lora8", 2)[0])}
        assert len({r.json()["choices"][0]["text"] for r in answers}) == 1

        added = client.post("/v1/adapters", json={"folder": "lora8", "name": "twin"})
        assert added.status_code == 200 and added.json()["state"] == "ready"
        twin = client.post("/v1/completions", json=ASK | {"model": "twin"}).json()["choices"][0]["text"]
        assert twin == answers[0].json()["choices"][0]["text"]
        assert client.post("/v1/completions", json=ASK | {"model": "nobody"}).status_code == 404

        events = []
        with client.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]" and len(events) > 10
        health = client.get("/health").json()
        assert health["status"] == "ok" and [r["adapters"] for r in health["replicas"]] == [2, 2]
