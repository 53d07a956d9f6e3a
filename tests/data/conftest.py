"""Tokenizers small enough to check by eye."""

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }}\n{{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
VOCABULARY = str.split(
    "<unk> <eos> <|im_start|> <|im_end|> <s> system user assistant a b c d e f g h A: Q: 4 2 + ### Response: "
    "<think> </think> [INST] [/INST]"
)


def fast(tokenizer, template=None, **special):
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


@pytest.fixture
def words():
    """One token a word; white space is not kept."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<|im_start|>", "<|im_end|>"]
    return fast(tokenizer, CHATML, unk_token="<unk>", eos_token="<eos>", additional_special_tokens=special)


@pytest.fixture(scope="session")
def pairs():
    """Byte-level BPE that has merged what stands together often, also over the boundary of "A:" and what follows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Q: 2+2 A: 4", "Q: 3+4 A: 7", "naïve café"] * 20, trainer)
    return fast(tokenizer, CHATML, eos_token="<eos>", additional_special_tokens=special[1:])


@pytest.fixture(scope="session")
def spaced():
    """A tokenizer in SentencePiece's manner: it puts a space before whatever it is given, and a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {word: k for k, word in enumerate(["<unk>", "<s>", "<eos>", "▁", "\n", "▁a", "▁b", *"abcdQA:"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<eos>")
