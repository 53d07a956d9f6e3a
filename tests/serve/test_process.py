"""The command as a process: killed it starts again clean; told to stop it finishes what it began."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from tiny import FORMS, MODELS, trained

COMMAND = [sys.executable, "-m", "veneer.cli", "serve"]
ASK = {"model": "lora8", "prompt": "abc abd", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base, adapters): a model with a tokenizer of single letters, and one adapter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("process")
    base = MODELS["llama"]()
    base.config.eos_token_id = base.generation_config.eos_token_id = None
    base.save_pretrained(root / "base")
    words = {"<unk>": 0, "<s>": 1} | {chr(33 + n): n + 2 for n in range(87)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(root / "base")
    trained(base, *FORMS["lora8"])[1].save(root / "adapters" / "lora8")
    return root / "base", root / "adapters"


class Running:
    """``veneer serve`` on a port, ready to answer."""

    def __init__(self, folders, port):
        base, adapters = folders
        command = [*COMMAND, "--model", base, "--adapters", adapters]
        command += ["--port", port, "--memory", "0.01", "--batch", "4", "--threads", "1", "--drain", "60"]
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [str(c) for c in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self.log = []
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        end = time.monotonic() + 240
        while True:
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.log)
            try:
                if httpx.get(self.address + "/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def ask(self, **more):
        return httpx.post(self.address + "/v1/completions", json=ASK | more, timeout=120)


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_an_address_that_is_taken_is_said_in_one_sentence_before_the_model_is_read(folders):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [*COMMAND, "--model", str(folders[0]), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.startswith(f"veneer: cannot listen on 127.0.0.1:{port} (") and done.stderr.count("\n") == 1


def test_a_killed_server_starts_again_clean_and_a_stopped_one_finishes_what_it_began(folders):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = files(folders[1])
    first = Running(folders, port)
    try:
        want = first.ask().json()["choices"][0]["text"]
        with httpx.stream(
            "POST", first.address + "/v1/completions", json=ASK | {"max_tokens": 200, "stream": True}, timeout=120
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            first.process.kill()
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert first.process.wait(30) == -signal.SIGKILL
    finally:
        first.process.kill()
    assert files(folders[1]) == before

    second = Running(folders, port)
    try:
        assert second.ask().json()["choices"][0]["text"] == want
        with httpx.stream(
            "POST", second.address + "/v1/completions", json=ASK | {"max_tokens": 200, "stream": True}, timeout=120
        ) as stream:
            lines = stream.iter_lines()
            next(lines)
            second.process.send_signal(signal.SIGTERM)
            rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert len([e for e in rest if e["choices"][0]["text"]]) >= 198
        assert second.process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            second.ask()
    finally:
        second.process.kill()
    assert all(json.loads(line)["event"] for line in second.log if line.strip())
