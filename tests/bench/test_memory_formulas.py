"""The formulas of what is kept for backward count what a small model keeps, to the few bytes they leave out."""

import pytest
import torch

import veneer
from bench.memory import kept_formula
from bench.memory_formulas import Sizes
from bench.memory_kept import kept
from veneer.models.fast import fast_forms
from veneer.numerics.schedule import Schedule
from veneer.parts.plain import plain
from veneer.train.optimizer import build

ROWS, TOKENS = 2, 160  # attention in three runs of rows, the last one short

CASES = {
    "lora": "lora(rank=16)",
    "paca": "paca(rank=16)",
    "full": "full",
    "lisa": "full+lisa(blocks=1, period=2)",
    "s2ft": "s2ft(o=0.3, d=0.1)",
    "s2ft, down first": "s2ft(o=0.1, d=0.1)",
    "lst": "lst(reduction=4)",
    "sherl": "sherl",
}


def small():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).bfloat16().requires_grad_(False).train()


@pytest.mark.parametrize("label", CASES)
def test_kept_bytes_are_those_of_the_formula(label):
    model, ids = small(), torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) % 50
    adapter = veneer.attach(model, CASES[label], sites="linear", seed=1)
    adapter.optimizer = build(adapter, 1e-4, 0.0)
    for hook in adapter.hooks:
        hook.on_start(adapter, Schedule(100, 1e-4))
        hook.before_step(0)
    with fast_forms(model, plain):
        found = kept(model, lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state)
    assert found == pytest.approx(
        kept_formula(label.split(",")[0], adapter, Sizes.of(model.config, ROWS, TOKENS)), rel=2e-3
    )
