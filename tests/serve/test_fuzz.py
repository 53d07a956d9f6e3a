"""A thousand malformed requests, made from the interface's own description, and what must survive them."""

import copy
import warnings

import hypothesis
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_api import Letters
from tiny import FORMS, MODELS, trained

from veneer.serve.app import Settings, build
from veneer.serve.engine import Engine, Limits
from veneer.serve.trunk import Trunk

schemathesis = pytest.importorskip("schemathesis")
ALLOWED = {200, 400, 401, 403, 404, 405, 413, 429}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    base = MODELS["llama"]()
    trained(base, *FORMS["lora4"])[1].save(root / "lora4")
    engine = Engine(Trunk(copy.deepcopy(base)), 2000, tokens=4, limits=Limits(batch=4, queue=8))
    app = build(engine, Letters(), Settings("tiny", root, body=20_000, watch=0))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield app, client, engine


def still_well(client, engine):
    found = client.post("/v1/completions", json={"model": "lora4", "prompt": "abc", "max_tokens": 3, "temperature": 0})
    assert found.status_code == 200, found.text
    assert not engine.running and not engine.waiting


def settled(response):
    assert response.status_code in ALLOWED, (response.status_code, response.text[:300])
    if response.status_code >= 400:
        message = response.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in message


def test_requests_made_from_the_description_get_a_status_and_a_sentence(world):
    app, client, engine = world
    sent = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_dict(app.openapi())
        operations = [o.ok() for o in schema.get_all_operations()]
        assert len(operations) >= 9
        for operation in operations:
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

                @settings(
                    max_examples=100, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck), derandomize=True,
                )  # fmt: skip
                @given(case=operation.as_strategy(generation_mode=mode))
                def send(case):
                    given = case.as_transport_kwargs(base_url="http://testserver")
                    given = {
                        k: v
                        for k, v in given.items()
                        if k in ("method", "url", "headers", "params", "json", "data", "cookies")
                    }
                    body = given.get("json")
                    if isinstance(body, dict) and isinstance(body.get("max_tokens"), int):
                        body["max_tokens"] = min(body["max_tokens"], 5)
                    sent.append(given["url"])
                    settled(client.request(**given))

                try:
                    send()
                except (schemathesis.errors.InvalidSchema, hypothesis.errors.Unsatisfiable):
                    continue
    assert len(sent) > 600, "with the test below, a thousand"
    still_well(client, engine)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
FIELDS = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop",
    "stream",
    "logprobs",
    "n",
)


@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/adapters"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
    sane=st.booleans(),
)
def test_any_value_in_any_field_gets_a_status_and_a_sentence(world, path, body, sane):
    import json

    if sane:
        body = {"model": "lora4", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | body
    settled(world[1].post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff\xfe", b"{" * 5000, b'{"model":' + b"[" * 10_000])
def test_no_bytes_break_it(world, content):
    _, client, engine = world
    settled(client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}))
    still_well(client, engine)
