"""Prints how many bytes ``--check`` promises and how many the process took: ``python resident.py``."""

import json

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.serve.check import check
from veneer.serve.engine import Engine, Limits
from veneer.serve.request import Request
from veneer.serve.trunk import Trunk


def engine(width, layers, pages):
    """An engine on a random Llama, and its plan."""
    config = LlamaConfig(
        vocab_size=4000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=512,
    )  # fmt: skip
    trunk = Trunk(LlamaForCausalLM(config).eval())
    plan = check(trunk, None, pages, 8, 128)
    return Engine(trunk, pages, limits=Limits(batch=8, chunk=128), threaded=False), plan


def traffic(served, rounds):
    """Requests that all differ, until every page was written."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        for _ in range(8):
            served.submit(Request(torch.randint(0, 4000, (300,), generator=draw).tolist(), (), 4))
        served.run()
        if served.pool.free <= served.pool.pages // 100:
            return


traffic(engine(128, 1, 64)[0], 1)  # what the libraries take for themselves, once
own = psutil.Process()
before = own.memory_info().rss
big, plan = engine(512, 8, 800)
traffic(big, 20)
print(json.dumps({"promised": plan.total_bytes, "taken": own.memory_info().rss - before, "free": big.pool.free}))
