"""Tiny random models, one of each kind of layer that methods claim, with inputs and a loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 61


class Case(NamedTuple):
    """A model, a batch that it accepts, and the selection that has the layers in question."""

    model: nn.Module
    batch: dict[str, Tensor]
    sites: str

    def run(self) -> Tensor:
        """The output, without gradient."""
        with torch.no_grad():
            return output(self.model, self.batch)

    def loss(self) -> Tensor:
        """A scalar to differentiate."""
        return self.model(**self.batch).loss

    def calibration(self, count: int = 8) -> list[dict[str, Tensor]]:
        """Batches like this one, each with its tokens or pixels moved on."""
        moved = ("input_ids", "pixel_values")
        return [{k: v.roll(i, -1) if k in moved else v for k, v in self.batch.items()} for i in range(count)]


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The logits of a model."""
    return model(**batch).logits


class Output(NamedTuple):
    """What a model of transformers would give."""

    loss: Tensor
    logits: Tensor


class SmallCNN(nn.Module):
    """Two convolutions and a linear layer on 8 × 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.line = nn.Conv1d(12, 6, 3)
        self.out = nn.Linear(6, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Output:
        h = torch.relu(self.conv2(torch.relu(self.conv1(pixel_values))))
        logits = self.out(torch.relu(self.line(h.flatten(2))).mean(-1))
        return Output(nn.functional.cross_entropy(logits.float(), labels), logits)


def _tokens(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def llama(**config: Any) -> tf.PreTrainedModel:
    """Two blocks, four heads on two key-value heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(sizes | config)))


def make(kind: str, dtype: torch.dtype = torch.float32) -> Case:
    """The case called ``kind``, in eval mode, the same weights every time."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    batch, sites = _tokens(), "linear"
    if kind == "llama":
        model = llama()
    elif kind == "embedding":
        model, sites = llama(), "embedding"
    elif kind == "gpt2":
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=VOCABULARY, **ids)
        )
    elif kind == "bert":
        model = tf.BertForSequenceClassification(
            tf.BertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCABULARY
            )
        )
        batch["labels"] = torch.tensor([0, 1])
    elif kind == "vit":
        model = tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=8,
                patch_size=4, num_labels=3,
            )
        )  # fmt: skip
        batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
    elif kind == "t5":
        model = tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCABULARY,
                decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0,
            )
        )  # fmt: skip
    else:
        model, sites = SmallCNN(), "conv"
        batch = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 4])}
    with torch.no_grad():
        for p in model.parameters():  # norms and biases too: zeros hide mistakes
            p.add_(torch.randn(p.shape) * 0.02)
    torch.random.set_rng_state(state)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return Case(model.to(dtype).eval(), batch, sites)


KINDS = {
    "linear": ("llama", "gpt2", "bert", "vit", "t5"),
    "conv": ("cnn",),
    "embedding": ("embedding",),
    "module": ("llama", "bert"),
    "parameter": ("llama", "bert"),
}
