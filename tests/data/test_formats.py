"""What each kind of row becomes, token by token: ids in order, and which of them train."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veneer.data.dataset import prepare
from veneer.data.encode import Draft, Encoder
from veneer.data.formats import ALPACA, ALPACA_WITH_INPUT
from veneer.errors import UserError


def shown(tokenizer, row, **options):
    """The tokens of one row, those that train in brackets."""
    item = prepare([row], tokenizer, **options)[0]
    assert all(label in (-100, token) for token, label in zip(item["input_ids"], item["labels"]))
    tokens = tokenizer.convert_ids_to_tokens(item["input_ids"])
    return " ".join(f"[{t}]" if label != -100 else t for t, label in zip(tokens, item["labels"]))


TURNS = "<|im_start|> user a b <|im_end|> <|im_start|> assistant [c] [d] [<|im_end|>]"
TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
ROWS = [
    ("prompt and completion", {"prompt": "Q: a b A:", "completion": "c d"}, {}, "Q: a b A: [c] [d] [<eos>]"),
    ("completion with its own end", {"prompt": "a", "completion": "c <eos>"}, {}, "a [c] [<eos>]"),
    ("empty prompt", {"prompt": "", "completion": "c d e"}, {}, "c [d] [e] [<eos>]"),
    ("text", {"text": "a b c"}, {}, "a [b] [c] [<eos>]"),
    ("chat", {"messages": TALK}, {}, TURNS),
    ("ShareGPT", {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}]}, {}, TURNS),
    ("ShareGPT by roles", {"conversations": TALK}, {}, TURNS),
    (
        "ShareGPT with a system text",
        {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d"}], "system": "e"},
        {},
        "<|im_start|> system e <|im_end|> " + TURNS,
    ),
    ("completion as chat", {"prompt": "a b", "completion": "c d"}, {"template": "chat"}, TURNS),
    (
        "instruction as chat",
        {"instruction": "a", "input": "b", "output": "c d", "completion": "e"},
        {"template": "chat"},
        TURNS,
    ),
    ("template", {"prompt": "a b", "completion": "c"}, {"template": "Q: {prompt}\nA:"}, "Q: a b A: [c] [<eos>]"),
    (
        "template over columns",
        {"prompt": "a", "completion": "c", "hint": "{prompt}"},
        {"template": "{hint} {prompt}"},
        "<unk> a [c] [<eos>]",
    ),
    (
        "template over an instruction",
        {"instruction": "a", "input": "b", "output": "c"},
        {"template": "### {prompt} {input}"},
        "### a b b [c] [<eos>]",
    ),
    (
        "Jinja",
        {"prompt": "a", "completion": "c"},
        {"template": "{% for m in messages %}{{ m.content }} {% endfor %}"},
        "a [c]",
    ),
    (
        "mapped columns",
        {"question": "a", "answer": "c", "text": "d"},
        {"columns": {"prompt": "question", "completion": "answer"}},
        "a [c] [<eos>]",
    ),
    (
        "the mapped kind before another",
        {"prompt": "a", "completion": "c", "body": "d e"},
        {"columns": {"text": "body"}},
        "d [e] [<eos>]",
    ),
]


@pytest.mark.parametrize(("row", "options", "expected"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_only_the_answer_and_its_end_train(words, row, options, expected):
    assert shown(words, row, **options) == expected


def test_alpaca_rows_use_alpacas_prompts(pairs):
    for extra, prompt in (("b", ALPACA_WITH_INPUT), ("", ALPACA), (None, ALPACA)):
        item = prepare([{"instruction": "a {input}", "input": extra, "output": "c"}], pairs)[0]
        given = [token for token, label in zip(item["input_ids"], item["labels"]) if label == -100]
        assert pairs.decode(given) == prompt.replace("{input}", extra or "").replace("{instruction}", "a {input}")
        assert pairs.decode(item["input_ids"][len(given) :]) == "c<eos>"
    assert prompt.endswith("### Response:\n")


def test_no_token_spans_prompt_and_completion(pairs):
    """Joined, the tokenizer would fuse "A:" with what follows; the prompt's ids are those of the prompt alone."""
    row = {"prompt": "Q: 2+2 A:", "completion": " 4"}
    item = prepare([row], pairs)[0]
    prompt, completion = (pairs(text, add_special_tokens=False)["input_ids"] for text in row.values())
    assert pairs("Q: 2+2 A: 4", add_special_tokens=False)["input_ids"] != prompt + completion
    assert item["input_ids"] == [*prompt, *completion, pairs.eos_token_id]
    assert item["labels"] == [-100] * len(prompt) + [*completion, pairs.eos_token_id]


def test_no_space_is_invented_in_the_middle_of_a_row(spaced):
    assert shown(spaced, {"prompt": "aQ", "completion": "bc"}) == "<s> ▁a Q [b] [c] [<eos>]"
    assert shown(spaced, {"prompt": "aQ", "completion": " bc"}) == "<s> ▁a Q [▁b] [c] [<eos>]"
    assert shown(spaced, {"prompt": "aQ", "completion": "\nb"}) == "<s> ▁a Q [\n] [b] [<eos>]"
    assert shown(spaced, {"prompt": "<s>aQ", "completion": "b"}) == "<s> a Q [b] [<eos>]"  # not two of them
    assert shown(spaced, {"text": "abc"}) == "<s> [▁a] [b] [c] [<eos>]"


@given(st.lists(st.tuples(st.text("aé Q:\n4+", max_size=8), st.booleans()), min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_pieces_come_back_as_they_were_and_just_their_tokens_train(pairs, pieces):
    (encoded,) = Encoder(pairs).encode([Draft([("Q", False), *pieces])], 10_000)
    assert pairs.decode(encoded.ids) == "Q" + "".join(text for text, _ in pieces) + "<eos>"
    ends = next((trains for text, trains in reversed(pieces) if text), False)
    answers = "".join(text for text, trains in pieces if trains) + ("<eos>" if ends else "")
    assert pairs.decode([label for label in encoded.labels if label != -100]) == answers


def test_long_rows_are_cut_and_counted(words):
    rows = [{"prompt": "a b c", "completion": "d e f g h a"}, {"prompt": "a", "completion": "b"}]
    made = prepare(rows, words, max_length=8)
    assert [len(item["input_ids"]) for item in made] == [8, 3]
    assert made.truncated == [True, False]
    assert made[0]["labels"][-1] == words.convert_tokens_to_ids("h")


def test_rows_that_would_train_nothing_are_named_and_left_out(words):
    rows = [
        {"prompt": "a", "completion": ""},
        {"prompt": "a " * 8, "completion": "b"},
        {"prompt": "a", "completion": "b"},
    ]
    made = prepare(rows, words, max_length=8)
    assert made.rows == [2]
    assert [(drop.row, drop.where, drop.reason) for drop in made.dropped] == [
        (0, "data[0]", "the completion is empty"),
        (1, "data[1]", "its answer lies beyond max_length, 8 tokens of 10"),
    ]
    talks = [{"messages": TALK[:1]}, {"messages": [TALK[0], {"role": "assistant", "content": ""}]}, {"messages": TALK}]
    assert [drop.reason for drop in prepare(talks, words).dropped] == [
        "there is no assistant turn",
        "every assistant turn is empty",
    ]
    assert [drop.reason for drop in prepare([{"text": " "}, {"text": "a"}], words).dropped] == ["the text is empty"]


BAD = [
    ("unknown columns", {"question": "a"}, {}, r"data\[0\]: the columns are question; expected messages, .*name yours"),
    ("null", {"prompt": "a", "completion": None}, {}, r'data\[0\]: column "completion" is null'),
    ("a number", {"prompt": "a", "completion": 4}, {}, r'column "completion" holds a number; expected a text'),
    ("a list as text", {"text": ["a"]}, {}, r'column "text" holds a list; expected a text'),
    ("turns as prompt", {"prompt": TALK[:1], "completion": TALK[1:]}, {}, "the prompt is a list; .*column messages"),
    ("messages as text", {"messages": "a"}, {}, r'column "messages" holds a text; expected a list of turns'),
    ("no turns", {"messages": []}, {}, r'column "messages" holds an empty list'),
    ("a turn as text", {"messages": ["a"]}, {}, r"turn 1 is a text; expected an object with role and content"),
    ("a turn without role", {"messages": [{"content": "a"}]}, {}, r"turn 1 has content; expected an object with role"),
    ("a number as content", {"messages": [{"role": "user", "content": 1}]}, {}, r"content of turn 1 is a number"),
    ("no value", {"conversations": [{"from": "gpt"}]}, {}, r"turn 1 has from; expected an object with from and value"),
    ("unknown speaker", {"conversations": [{"from": "x", "value": "a"}]}, {}, r'turn 1 is from "x"; expected one of'),
    ("input not text", {"instruction": "a", "input": 3, "output": "b"}, {}, r'column "input" holds a number'),
    ("broken tools", {"messages": TALK, "tools": "[{"}, {}, r'column "tools" is broken JSON'),
    (
        "template without place",
        {"prompt": "a", "completion": "b"},
        {"template": "alpaca"},
        r'"alpaca" has no place for',
    ),
    (
        "template with unknown place",
        {"prompt": "a", "completion": "b"},
        {"template": "{promt}"},
        r"asks for \{promt\}, which data\[0\] does not have; found: prompt, completion; did you mean \"prompt\"",
    ),
    ("template for text", {"text": "a"}, {"template": "{prompt}"}, "plain text, which has no prompt"),
    ("template for chat", {"messages": TALK}, {"template": "{prompt}"}, "expected a Jinja text or no template"),
    ("template for labels", {"text": "a", "label": "b"}, {"template": "{prompt}"}, "the task is classification, which"),
    ("unknown name", {"a": "b"}, {"columns": {"promt": "a"}}, r'columns names "promt"; expected .*mean "prompt"'),
    (
        "unknown column",
        {"question": "b"},
        {"columns": {"prompt": "qestion"}},
        r'columns gives "qestion" for prompt, which data\[0\] does not have; found: question; did you mean "question"',
    ),
    ("nothing left", {"text": ""}, {}, r"none of the 1 rows would train anything; data\[0\]: the text is empty"),
    ("too short a length", {"text": "a"}, {"max_length": 3}, "max_length is 3; expected at least 8 tokens"),
    ("unknown task", {"text": "a"}, {"task": "casual"}, r'no task "casual"; expected auto, causal.*mean "causal"'),
    ("task without columns", {"image": "a"}, {"task": "causal"}, "columns are image; a language model needs one of"),
]


@pytest.mark.parametrize(("row", "options", "sentence"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_row_gives_one_sentence(words, row, options, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        prepare([row], words, **options)
    assert "\n" not in str(error.value)


def test_mixed_columns_name_the_line(words, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", "answer": "b"}\n')
    with pytest.raises(UserError, match=r'a\.jsonl, line 3: there is no column "completion", .*found: prompt, answer'):
        prepare(tmp_path / "a.jsonl", words)


def test_a_tokenizer_without_an_end_token_is_refused(words):
    words.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        prepare([{"text": "a b"}], words)
