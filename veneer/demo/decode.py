"""Greedy answers to many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch: int = 100) -> list[str]:
    """The likeliest continuation of each prompt, up to the end token or ``max_new_tokens``, without special tokens.

    Prompts of about the same length share a batch, padded on the left.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        texts = _continued(model, tokenizer, [prompts[i] for i in chosen], max_new_tokens)
        found.update(zip(chosen, texts, strict=True))
    return [found[i] for i in range(len(prompts))]


def _continued(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    import torch
    from transformers import GenerationConfig

    rows = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    end, width = tokenizer.eos_token_id, max(map(len, rows))
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=end)
    training = model.training
    model.eval()
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    model.train(training)
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
