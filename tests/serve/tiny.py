"""Tiny models, adapters of several forms on them, and transformers' own generate as the oracle."""

from __future__ import annotations

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import veneer

FORMS = {
    "lora4": ("lora", 4, "linear"),
    "lora8": ("lora", 8, "linear"),
    "dora16": ("dora", 16, "linear"),
    "pissa64": ("lora+pissa", 16, "attention"),
    "rs5": ("rslora", 5, "mlp"),
}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=89,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(0, 0.1)
    return model


MODELS = {"llama": llama, "gpt2": gpt2}


def trained(model, recipe, rank, sites, seed=0):
    """The recipe attached to a copy of the model, its tensors moved as training would."""
    own = copy.deepcopy(model)
    adapter = veneer.attach(own, recipe, rank=rank, sites=sites, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in adapter.parameters():
            p += torch.randn(p.shape, generator=generator) * 0.1
    return own, adapter


@torch.no_grad()
def greedy(model, prompt, count):
    """transformers' own generate, of one request alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return out[0, len(prompt) :].tolist()


def prompts(count, seed=0, shortest=3, longest=40):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, 89, (n,), generator=generator).tolist() for n in lengths]
