"""A client that reads its stream slowly, or never, costs the others nothing."""

import copy
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from test_api import Letters
from tiny import MODELS

from veneer.serve.app import Settings, build
from veneer.serve.engine import Engine, Limits
from veneer.serve.trunk import Trunk

LONG = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "temperature": 0}
LONG |= {"logprobs": True, "top_logprobs": 20}  # half a megabyte
PATH = "/v1/chat/completions"


@pytest.fixture
def server():
    """(port, app, engine, settings) on a socket that holds little for its clients."""
    engine = Engine(Trunk(copy.deepcopy(MODELS["llama"]())), 3000, tokens=4, limits=Limits(batch=4, queue=2))
    settings = Settings("tiny", patience=3600.0)
    app = build(engine, Letters(), settings)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    listening.bind(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical", http="h11", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until(lambda: running.started)
    yield listening.getsockname()[1], app, engine, settings
    running.should_exit = True
    thread.join(20)


def until(true, seconds=100.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def silent(port):
    """A connection that has asked and reads nothing; the kernel holds as little for it as it can."""
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    found.connect(("127.0.0.1", port))
    content = json.dumps(LONG | {"stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    found.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + content)
    return found


def test_readers_who_take_nothing_hold_nobody_up(server):
    port, app, engine, _ = server
    service = app.state.service
    readers = [silent(port) for _ in range(6)]
    try:
        until(lambda: engine.totals.reasons.get("length", 0) == 6)
        until(lambda: service.open == 0)
        waiting = [q.qsize() for q in service._queues.values()]
        assert len(waiting) == 6 and all(0 < n <= 201 for n in waiting)
        for _ in range(8):  # more than the queue and the batch hold: unread answers take no place
            body = {"model": "tiny", "prompt": "b", "max_tokens": 3}
            assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=100).status_code == 200
    finally:
        for reader in readers:
            reader.close()
    until(lambda: not service._queues)


def test_who_takes_nothing_for_too_long_is_given_up(server):
    port, app, engine, settings = server
    settings.patience = 0.5
    with silent(port) as reader:
        until(lambda: engine.totals.reasons and not app.state.service._queues)
        got = b""
        while piece := reader.recv(65536):
            got += piece
    assert got.startswith(b"HTTP/1.1 200") and b"[DONE]" not in got


def test_who_reads_slowly_gets_the_whole_answer(server):
    port, _, engine, _ = server
    found = httpx.post(f"http://127.0.0.1:{port}{PATH}", json=LONG, timeout=100).json()
    with silent(port) as reader:
        until(lambda: engine.totals.reasons.get("length", 0) == 2)
        got = b""
        while piece := reader.recv(2048):
            got += piece
            time.sleep(0.002)
    lines = [line[6:] for line in got.decode().split("\n") if line.startswith("data: {")]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines]
    assert "".join(pieces) == found["choices"][0]["message"]["content"] and b"[DONE]" in got
