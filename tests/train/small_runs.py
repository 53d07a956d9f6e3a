"""A two-block Llama and rows for it, small enough that a run of forty steps takes a fraction of a second."""

import torch

VOCABULARY = 64


def llama(seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


def encoded(count, seed=1):
    """Rows of 4 to 19 tokens that count up by three: learnable, with a prompt of two tokens that does not train."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        n, start = torch.randint(4, 20, (1,), generator=g).item(), torch.randint(0, 61, (1,), generator=g).item()
        ids = [1 + (start + 3 * k) % (VOCABULARY - 1) for k in range(n)]
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def collated(rows, size):
    """The rows in order, ``size`` to a batch, padded."""
    from veneer.data import Collator

    return [Collator(0)(rows[i : i + size]) for i in range(0, len(rows), size)]
