"""For all tests: the tiny models of the contract, a cache of their own, no progress bars, a model of whole words."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "contract"))
os.environ.setdefault("VENEER_CACHE", str(Path(tempfile.gettempdir()) / "veneer-test-cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["say", "the", "colour", "of", "sky", "grass", "rose", "red", "blue", "green", "warm", "cold"]
COLOURS = [("sky", "blue"), ("grass", "green"), ("rose", "red")]


@pytest.fixture(scope="session")
def word_model(tmp_path_factory):
    """A two-layer Llama with a vocabulary of whole words, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("words")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=1, tie_word_embeddings=False,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def colour_rows():
    """A function that gives so many questions about three colours."""

    def rows(count):
        asked = [COLOURS[i % len(COLOURS)] for i in range(count)]
        return [{"prompt": f"say the colour of {thing}", "completion": f" {colour}"} for thing, colour in asked]

    return rows


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The documentation, built once for all processes of a run of the tests."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'veneer[docs]'")
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = base / "site"
    with open(base / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (base / "site.built").exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(out)]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (base / "site.built").touch()
    return out
