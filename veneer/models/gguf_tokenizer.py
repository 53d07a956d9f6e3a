"""The tokenizer that a GGUF file describes in its metadata, as a transformers tokenizer.

Byte-level BPE ("gpt2": SmolLM, Llama 3, Qwen) is built here; a SentencePiece vocabulary ("llama": Llama 2, Mistral)
goes through transformers' own reader.
"""

from __future__ import annotations

from pathlib import Path

from veneer.errors import UserError

CONTROL, USER_DEFINED = 3, 4  # token types

# How text is cut before the merges, by name of the pre-tokenizer; None is GPT-2's own cut, "digits" that after each
# digit was set apart, as llama.cpp does it (src/llama-vocab.cpp). Transformers' own reader leaves the digits in place.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
CUTS = {
    "gpt-2": None,
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def build_tokenizer(path: Path, facts: dict[str, object], length: int) -> object:
    """A fast transformers tokenizer from GGUF metadata.

    Args:
        path: the file, for messages and for transformers' reader.
        facts: the metadata as plain values.
        length: the model's context, in tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    kind = facts.get("tokenizer.ggml.model")
    if kind == "llama":
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        tokenizer.model_max_length = length
        return tokenizer
    if kind != "gpt2":
        raise UserError(f'{path} has a tokenizer of the kind "{kind}"; byte-level BPE and SentencePiece can be read')
    tokens = facts["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in facts
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(path, facts, tokens, special.get("bos_token")), model_max_length=length, **special
    )
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(path: Path, facts: dict[str, object], tokens: list[str], begin: str | None) -> object:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    name = facts.get("tokenizer.ggml.pre", "gpt-2")
    if name not in CUTS:
        raise UserError(f'{path} cuts text by "{name}" before tokenizing; known are {", ".join(CUTS)}')
    cut = CUTS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=cut == _LLAMA3)
    )
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))]
    if cut is not None:
        first = pre_tokenizers.Digits(True) if cut == "digits" else pre_tokenizers.Split(Regex(cut), "isolated")
        steps.insert(0, first)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, facts.get("tokenizer.ggml.token_type", ())))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == USER_DEFINED])
    if facts.get("tokenizer.ggml.add_bos_token") and begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", "$B"], special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer
