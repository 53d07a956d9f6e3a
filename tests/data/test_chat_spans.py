"""Which part of a rendered conversation trains, for templates of every manner, checked text by text."""

import pytest

from veneer.data.chat import ChatTemplate
from veneer.data.dataset import prepare
from veneer.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }}\n{{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]
MARKED = CHATML.replace(
    "<|im_start|> {{ m['role'] }}\n{{ m['content'] }} <|im_end|>\n",
    "<|im_start|> {{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' <|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }} <|im_end|>{% endif %}\n",
)
MARKED_SHORT = MARKED.replace("' <|im_end|>' }}{% endgeneration %}", "' ' }}{% endgeneration %}<|im_end|>")
# No prompt for answers, as Mistral's and Llama 2's: the answer simply follows.
BRACKETS = (
    "<s>{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<eos>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}"
)
# Headings for every turn and none for the answer to come; no end token.
HEADINGS = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
# Thoughts are written for the last turn and dropped from earlier ones, as Qwen 3 and DeepSeek R1 do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends the text once more after the last answer, as Phi 3.
TWICE = CHATML.replace("{% endif %}", "{% else %}<eos>{% endif %}")


def trained(tokenizer, template, talk=TALK):
    tokenizer.chat_template = template
    draft = ChatTemplate(tokenizer).draft(talk, None, "row 1")
    assert "".join(text for text, _ in draft.pieces) == tokenizer.apply_chat_template(talk, tokenize=False)
    return [text for text, trains in draft.pieces if trains]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        pytest.param(CHATML, ["c d <|im_end|>", "f <|im_end|>"], id="prompted"),
        pytest.param(MARKED, ["c d <|im_end|>", "f <|im_end|>"], id="marked"),
        pytest.param(MARKED_SHORT, ["c d <|im_end|>", "f <|im_end|>"], id="marked without the end token"),
        pytest.param(BRACKETS, [" c d<eos>", " f<eos>"], id="no prompt for answers"),
        pytest.param(HEADINGS, ["c d\n\n", "f\n\n"], id="headings, no end token"),
        pytest.param(THINKING, ["c d<|im_end|>", "<think>\n\n</think>\n\nf<|im_end|>"], id="earlier thoughts dropped"),
        pytest.param(TWICE, ["c d <|im_end|>", "f <|im_end|>"], id="end of text after the last answer"),
    ],
)
def test_answers_and_their_end_tokens_train(words, template, answers):
    assert trained(words, template) == answers


def test_an_answer_before_any_question_is_found(words):
    assert trained(words, CHATML, TALK[2:]) == ["c d <|im_end|>", "f <|im_end|>"]


def test_an_answer_that_stands_in_the_question_too_is_told_apart(words):
    talk = [{"role": "user", "content": "f"}, {"role": "assistant", "content": "f"}]
    assert trained(words, CHATML, talk) == ["f <|im_end|>"]
    assert trained(words, HEADINGS, talk) == ["f\n\n"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (THINKING.replace("| trim", "| trim | upper"), r"row 1: .*not show for certain.*\(message 3 reads differently"),
        ("{{ messages | length }}", "not show for certain"),
        ("{{ raise_exception('no system turns') }}", r"row 1: the chat template refuses this row \(no system turns\)"),
        ("{% if %}", "the chat template refuses this row"),
    ],
)
def test_what_is_not_certain_is_refused(words, template, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        trained(words, template)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_a_template_says_what_to_do(words):
    words.chat_template = None
    with pytest.raises(UserError, match="chat rows need a chat template and this tokenizer has none"):
        prepare([{"messages": TALK}], words)
    assert prepare([{"messages": TALK}], words, template=MARKED).trained == 5


def test_ids_are_those_of_the_tokenizers_own_rendering(words, pairs):
    for tokenizer in (words, pairs):
        item = prepare([{"messages": TALK}], tokenizer)[0]
        whole = tokenizer.apply_chat_template(TALK, tokenize=False)
        assert item["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_marks_give_the_labels_that_transformers_gives(words):
    words.chat_template = MARKED
    item = prepare([{"messages": TALK}], words)[0]
    theirs = words.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert item["input_ids"] == theirs["input_ids"]
    assert [label != -100 for label in item["labels"]] == [bool(mark) for mark in theirs["assistant_masks"]]
