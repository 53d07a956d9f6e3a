"""The server as its users meet it: the openai client, streams, stop strings, wrong requests, wrong tokens."""

import copy
import shutil
import socket
import threading
import time

import httpx
import openai
import pytest
import uvicorn
from tiny import FORMS, MODELS, greedy, trained

from veneer.serve.app import Settings, build
from veneer.serve.engine import Engine, Limits
from veneer.serve.trunk import Trunk

TOKEN = "s3cret"


class Letters:
    """A tokenizer of one character a token, from U+0020 on; token 3 ends."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text):
        return {"input_ids": [2 + (ord(c) - 32) % 87 for c in text]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(30 + t) for t in tokens)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A running server: its address, engine, folder of adapters and the adapted models."""
    root = tmp_path_factory.mktemp("adapters")
    base, adapted = MODELS["llama"](), {}
    for number, name in enumerate(("lora4", "dora16")):
        own, adapter = trained(base, *FORMS[name], seed=number)
        adapter.save(root / name)
        adapted[name] = own
    engine = Engine(Trunk(copy.deepcopy(base)), 3000, tokens=4, limits=Limits(batch=4, queue=6))
    settings = Settings("tiny", root, TOKEN, body=20_000, watch=0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = build(engine, Letters(), settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            httpx.get(address + "/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    yield address, engine, root, base, adapted
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def client(world):
    return openai.OpenAI(base_url=world[0] + "/v1", api_key=TOKEN, max_retries=0)


@pytest.fixture
def raw(world):
    with httpx.Client(base_url=world[0], headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as found:
        yield found


def text_of(model, prompt, count):
    return Letters().decode(greedy(model, Letters()(prompt)["input_ids"], count))


def idle(engine):
    for _ in range(400):
        if not engine.busy:
            return
        time.sleep(0.02)
    raise AssertionError("the engine is still busy")


def test_the_base_and_every_adapter_is_a_model(client):
    assert [m.id for m in client.models.list()] == ["tiny", "dora16", "lora4"]
    assert client.models.retrieve("lora4").id == "lora4"


@pytest.mark.parametrize("name", ["tiny", "lora4", "dora16"])
def test_completions_are_what_the_model_generates(client, world, name):
    _, _, _, base, adapted = world
    found = client.completions.create(model=name, prompt="Hello there", max_tokens=9, temperature=0)
    assert found.choices[0].text == text_of(adapted.get(name, base), "Hello there", 9)
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (11, 9)


def test_a_stream_is_the_answer_in_pieces(client, world):
    stream = client.chat.completions.create(
        model="lora4",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    events = list(stream)
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == text_of(world[4]["lora4"], "User: Hi\n\nAssistant:", 8)
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 8 and len(events) > 8


def test_a_stop_string_ends_the_answer_and_is_not_shown(client, world):
    whole = text_of(world[3], "Once", 12)
    stop = whole[4:6]
    for stream in (False, True):
        found = client.completions.create(
            model="tiny", prompt="Once", max_tokens=12, temperature=0, stop=[stop, "never"], stream=stream
        )
        text = "".join(e.choices[0].text for e in found) if stream else found.choices[0].text
        assert text == whole[: whole.index(stop)]


def test_an_answer_that_a_stop_string_ends_is_counted_as_stopped(client, raw, world):
    def counted():
        idle(world[1])
        lines = dict(line.rsplit(" ", 1) for line in raw.get("/metrics").text.splitlines() if line[0] != "#")
        reasons = (f'veneer_requests_ended_total{{reason="{r}"}}' for r in ("stop", "cancelled"))
        return [float(lines.get(name, 0)) for name in (*reasons, "veneer_request_seconds_count")]

    answer = text_of(world[3], "go", 12)
    stopped, cancelled, timed = counted()
    client.completions.create(model="tiny", prompt="go", max_tokens=100, temperature=0, stop=answer[3:6])
    assert counted() == [stopped + 1, cancelled, timed + 1]


def test_seeds_repeat_and_differ(client):
    def draw(seed):
        return client.completions.create(model="tiny", prompt="Dice", max_tokens=12, temperature=1.5, seed=seed)

    assert draw(1).choices[0].text == draw(1).choices[0].text != draw(2).choices[0].text


def test_logprobs_are_those_of_the_model(client, world):
    import torch

    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=2,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    first = found.choices[0].logprobs.content[0]
    with torch.no_grad():
        logits = world[3](torch.tensor([Letters()("User: x\n\nAssistant:")["input_ids"]])).logits[0, -1]
    want = logits.log_softmax(-1).topk(3)
    assert [t.logprob for t in first.top_logprobs] == pytest.approx(want.values.tolist(), abs=1e-4)
    assert first.logprob == pytest.approx(float(want.values[0]), abs=1e-4)


def test_a_blend_is_a_model_too(client):
    found = client.completions.create(model="lora4*0.7+dora16*0.3", prompt="Mix", max_tokens=4, temperature=0)
    assert found.usage.completion_tokens == 4


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"model": "lora5"}, 404, "lora4"),
        ({"model": "lora4*x+dora16"}, 400, "weight"),
        ({"model": "../../etc"}, 404, "there is no model"),
        ({"prompt": ""}, 400, "prompt has no tokens"),
        ({"prompt": "x" * 300}, 400, "positions"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"n": 3}, 400, "n is not supported"),
        ({"prompt": [5, 500]}, 400, "vocabulary"),
        ({"prompt": ["a", "b"]}, 400, "2 prompts in one request"),
        ({"prompt": [1, "a"]}, 400, "prompt.1: Input should be a valid integer"),
        ({"stop": ["x"] * 20}, 400, "stop: List should have at most 16"),
        ({"prompt": "x" * 30_000}, 413, "bytes"),
    ],
)
def test_a_wrong_request_gets_its_status_and_one_sentence(raw, body, status, said):
    found = raw.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2} | body)
    assert found.status_code == status
    error = found.json()["error"]
    assert said in error["message"] and "\n" not in error["message"] and error["code"] == status


def test_a_part_of_a_message_that_is_no_text_is_named(raw):
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    found = raw.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": content}]})
    assert found.status_code == 400
    assert found.json()["error"]["message"] == "messages.0.content.0.type: Input should be 'text'"


def test_a_list_of_one_prompt_is_a_prompt(client):
    for one in (["ab"], [Letters()("ab")["input_ids"]]):
        alone, listed = (
            client.completions.create(model="tiny", prompt=p, max_tokens=3, temperature=0) for p in ("ab", one)
        )
        assert alone.choices[0].text == listed.choices[0].text and alone.usage.prompt_tokens == 2


def test_what_is_no_json_gets_one_sentence(raw):
    found = raw.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert found.status_code == 400 and "Content-Type: application/json" in found.json()["error"]["message"]
    found = raw.post("/v1/completions", content=b"{not json", headers={"Content-Type": "application/json"})
    assert found.status_code == 400 and found.json()["error"]["message"] == "the body is not valid JSON"


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/adapters", "/metrics"])
def test_without_the_token_nothing_is_told(world, path, header):
    assert httpx.get(world[0] + path, headers=header).status_code == 401


def test_adapters_come_go_and_change_while_it_runs(raw, client, world):
    _, engine, root, _, adapted = world
    shutil.copytree(root / "lora4", root / ".late")
    (root / ".late").rename(root / "late")
    for _ in range(100):
        if "late" in engine.bank.entries:
            break
        time.sleep(0.05)
    ask = {"prompt": "Change", "max_tokens": 6, "temperature": 0}
    assert client.completions.create(model="late", **ask).choices[0].text == text_of(adapted["lora4"], "Change", 6)

    found = raw.post("/v1/adapters", json={"folder": "dora16", "name": "late"}).json()
    assert (found["state"], found["form"], found["error"]) == ("ready", "dora", 0.0)
    assert client.completions.create(model="late", **ask).choices[0].text == text_of(adapted["dora16"], "Change", 6)

    assert raw.delete("/v1/adapters/late").json()["deleted"]
    assert raw.delete("/v1/adapters/late").status_code == 404
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="late", **ask)
    shutil.rmtree(root / "late")


def test_a_run_is_served_by_its_name_and_forgotten_when_its_adapter_goes(client, world):
    _, _, root, _, adapted = world
    (root / "run" / "checkpoint-2").mkdir(parents=True)
    (root / "run" / "run.json").write_text("{}")
    shutil.copytree(root / "lora4", root / "run" / "checkpoint-2" / "adapter")
    shutil.copytree(root / "lora4", root / "run" / ".adapter")
    (root / "run" / ".adapter").rename(root / "run" / "adapter")

    def listed(wanted):
        for _ in range(200):
            if ("run" in [m.id for m in client.models.list()]) == wanted:
                return True
            time.sleep(0.05)
        return False

    assert listed(True)
    found = client.completions.create(model="run", prompt="go on", max_tokens=8, temperature=0)
    assert found.choices[0].text == text_of(adapted["lora4"], "go on", 8)
    shutil.rmtree(root / "run" / "adapter")
    assert listed(False)
    shutil.rmtree(root / "run")


def test_no_folder_takes_the_name_of_the_base(client, world, caplog):
    shutil.copytree(world[2] / "lora4", world[2] / "tiny")
    time.sleep(0.5)
    assert [m.id for m in client.models.list()].count("tiny") == 1
    assert any("tiny is not served: that is the name of the base" in r.getMessage() for r in caplog.records)
    shutil.rmtree(world[2] / "tiny")


@pytest.mark.parametrize(("folder", "status"), [("../lora4", 400), ("..", 400), ("nope", 404), ("a/b", 400)])
def test_no_name_leaves_the_folder(raw, folder, status):
    assert raw.post("/v1/adapters", json={"folder": folder}).status_code == status


def test_a_link_out_of_the_folder_is_refused(raw, world, tmp_path):
    shutil.copytree(world[2] / "lora4", tmp_path / "outside")
    (world[2] / "link").symlink_to(tmp_path / "outside")
    try:
        found = raw.post("/v1/adapters", json={"folder": "link"})
        assert found.status_code == 400 and "leads out" in found.json()["error"]["message"]
    finally:
        (world[2] / "link").unlink()


def test_a_corrupt_adapter_is_refused_and_the_others_go_on(raw, client, world):
    folder = world[2] / "broken"
    shutil.copytree(world[2] / "lora4", folder)
    file = folder / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    try:
        found = raw.post("/v1/adapters", json={"folder": "broken"})
        assert found.status_code == 400 and "cut short" in found.json()["error"]["message"]
        found = raw.post("/v1/completions", json={"model": "broken", "prompt": "a", "max_tokens": 2})
        assert found.status_code == 400 and "cut short" in found.json()["error"]["message"]
        assert client.completions.create(model="lora4", prompt="a", max_tokens=2).usage.completion_tokens == 2
    finally:
        shutil.rmtree(folder)
        raw.delete("/v1/adapters/broken")


def test_a_client_that_leaves_frees_its_pages(raw, world):
    engine = world[1]
    with raw.stream(
        "POST",
        "/v1/completions",
        json={"model": "lora4", "prompt": "a", "max_tokens": 200, "temperature": 0, "stream": True},
    ) as s:
        next(s.iter_lines())
        assert engine.running
    idle(engine)
    assert engine.totals.reasons.get("cancelled", 0) >= 1


def test_under_too_much_load_it_says_when_to_come_again_and_recovers(world, client):
    address, engine, *_ = world
    statuses, retries = [], []

    def one():
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as c:
            r = c.post("/v1/completions", json={"model": "lora4", "prompt": "go", "max_tokens": 40, "temperature": 0})
            statuses.append(r.status_code)
            if r.status_code == 429:
                retries.append(int(r.headers["retry-after"]))

    threads = [threading.Thread(target=one) for _ in range(60)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert set(statuses) == {200, 429} and len(statuses) == 60
    assert len(retries) == statuses.count(429) and all(1 <= r <= 60 for r in retries)
    assert client.completions.create(model="lora4", prompt="go", max_tokens=2).usage.completion_tokens == 2
    idle(engine)
    assert not engine.running and not engine.waiting


def test_health_and_metrics_tell_what_happened(raw):
    assert raw.get("/health").json()["status"] == "ok"
    lines = raw.get("/metrics").text.splitlines()
    assert any(line.startswith("veneer_generated_tokens_total ") and float(line.split()[1]) > 0 for line in lines)
    assert any(line.startswith("veneer_first_token_seconds_count ") for line in lines)


def test_the_page_names_no_other_host(raw):
    page = raw.get("/").text
    assert "<title>Veneer</title>" in page and "://" not in page
