"""A small model under the name of the packaged one, and rows, in a folder of the test's own."""

import json

import pytest
import torch

WORDS = ["say", "the", "colour", "of", "sky", "grass", "rose", "red", "blue", "green", "warm", "cold"]
COLOURS = [("sky", "blue"), ("grass", "green"), ("rose", "red")]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A two-layer Llama with a vocabulary of whole words, as a transformers folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("small")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(small_model, tmp_path, monkeypatch):
    """The current folder, holding train.jsonl, test.jsonl and labels.jsonl; "smollm2-135m" is the small model."""
    from veneer.models import load

    monkeypatch.setattr(load, "packaged_path", lambda name: small_model)
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"say the colour of {thing}", "completion": f" {colour}"} for thing, colour in COLOURS]
    labels = [{"text": f"say {word}", "label": "warm" if word == "red" else "cold"} for word in ("red", "blue")]
    for name, rows in (("train", pairs * 8), ("test", pairs), ("labels", labels * 12)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
