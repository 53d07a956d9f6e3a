"""A two-layer Llama of whole words, as a transformers folder, and questions about colours."""

import json

import pytest
import torch

WORDS = ["say", "the", "colour", "of", "sky", "grass", "rose", "red", "blue", "green"]
PAIRS = [("sky", "blue"), ("grass", "green"), ("rose", "red")]


@pytest.fixture(scope="session")
def words_model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    base = tmp_path_factory.mktemp("words") / "base"
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(base)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    return base


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """(sixty questions with answers, a general text), files."""
    folder = tmp_path_factory.mktemp("colours")
    rows = [
        {"prompt": f"{'say ' * (i % 4)}the colour of {PAIRS[i % 3][0]}", "completion": f" {PAIRS[i % 3][1]}"}
        for i in range(60)
    ]
    data, general = folder / "colours.jsonl", folder / "general.txt"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    general.write_text(" ".join(WORDS * 40))
    return data, general
