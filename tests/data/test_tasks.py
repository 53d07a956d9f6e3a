"""The other tasks: classes, numbers, tagged words and images, and the faults of their rows."""

import numpy as np
import pytest
import torch

from veneer.data.dataset import prepare
from veneer.data.images import open_image, pixels
from veneer.errors import UserError

TEXTS = [{"text": "a b", "label": "yes"}, {"text": "c", "label": "no"}, {"text": "d", "label": "yes"}]
TAGGED = [{"tokens": ["ab", "4"], "tags": ["X", "O"]}, {"tokens": ["4"], "tags": ["O"]}]


def processor(image):
    """(3, 2, 2): the mean colour of a PIL image."""
    colour = torch.tensor(np.asarray(image), dtype=torch.float32).mean((0, 1))
    return colour[:, None, None].expand(3, 2, 2)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a"}, "causal"),
        ({"prompt": "a", "completion": "b", "label": "c", "text": "d"}, "causal"),
        ({"text": "a", "label": "b"}, "classification"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "classification"),
        ({"text": "a", "label": 1.0}, "classification"),
        ({"text": "a", "label": "0.5"}, "regression"),
        ({"text": "a", "text2": "b", "label": 2.5}, "regression"),
        (TAGGED[0], "token-classification"),
        ({"image": np.zeros((2, 2), np.uint8), "label": 1}, "image-classification"),
    ],
)
def test_the_task_is_seen_from_the_columns(words, row, task):
    from veneer.data.read import Rows
    from veneer.data.tasks import detect

    assert detect(Rows([row])) == task


def test_classes_are_sorted_names(words):
    made = prepare(TEXTS, words)
    assert (made.task, made.label_names) == ("classification", ["no", "yes"])
    assert [item["labels"] for item in made] == [1, 0, 1]
    assert made[0]["input_ids"] == words("a b")["input_ids"]
    assert made.trained == 3


def test_whole_numbers_keep_their_order_and_text_or_number_is_the_same_label(words):
    rows = [{"text": "a", "label": label} for label in (10, "2", 1.0, np.int64(2))]
    made = prepare(rows, words)
    assert made.label_names == ["1", "2", "10"]
    assert [item["labels"] for item in made] == [2, 1, 0, 1]


def test_evaluation_data_uses_the_names_of_the_training_data(words):
    names = prepare(TEXTS, words).label_names
    assert [item["labels"] for item in prepare(TEXTS[2:], words, label_names=names)] == [1]
    assert [item["labels"] for item in prepare([{"text": "a", "label": 0}], words, label_names=names)] == [0]
    with pytest.raises(UserError, match=r'data\[0\]: the label "yse" is not one of the 2 known \(no, yes\); .*"yes"'):
        prepare([{"text": "a", "label": "yse"}], words, label_names=names)


def test_names_that_the_source_declares_keep_their_order(words):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["yes", "no"])})
    source = datasets.Dataset.from_dict({"text": ["a", "b"], "y": [0, 1]}, features)
    made = prepare(source, words, columns={"label": "y"})
    assert made.label_names == ["yes", "no"]
    assert [item["labels"] for item in made] == [0, 1]


def test_pairs_are_encoded_as_the_tokenizer_does(words):
    from tokenizers import processors

    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A <eos>", "<s> $A <eos> $B:1 <eos>:1", [("<s>", 4), ("<eos>", 1)]
    )
    words.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [{"premise": "a b", "hypothesis": "c", "label": "x"}, {"premise": "a " * 9, "hypothesis": "d", "label": "y"}]
    made = prepare(rows, words, max_length=8)
    assert words.convert_ids_to_tokens(made[0]["input_ids"]) == ["<s>", "a", "b", "<eos>", "c", "<eos>"]
    assert made[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert words.convert_ids_to_tokens(made[1]["input_ids"])[-3:] == ["<eos>", "d", "<eos>"]
    assert made.truncated == [False, True]
    assert set(made.batch([0, 1])) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_regression_labels_are_floats(words, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,0.5\nb,2\n")
    made = prepare(tmp_path / "a.csv", words)
    assert (made.task, made.label_names) == ("regression", None)
    batch = made.batch([0, 1])
    assert batch["labels"].tolist() == [0.5, 2.0]
    assert batch["labels"].dtype == torch.float32


def test_the_first_token_of_a_word_carries_its_tag(pairs):
    made = prepare(TAGGED, pairs)
    assert made.label_names == ["O", "X"]
    first = pairs.convert_ids_to_tokens(made[0]["input_ids"])
    assert first == ["a", "b", "4"]
    assert made[0]["labels"] == [1, -100, 0]
    assert prepare([{"tokens": "ab 4", "tags": "X O"}], pairs)[0]["labels"] == [1, -100, 0]
    assert made.trained == 3


def test_long_tagged_rows_keep_whole_labels(pairs):
    made = prepare(
        [{"tokens": ["ab"] * 9, "tags": ["X", "O", "X"] * 3}, {"tokens": [], "tags": []}], pairs, max_length=8
    )
    assert made[0]["labels"] == [1, -100, 0, -100, 1, -100, 1, -100]
    assert made.truncated == [True]
    assert made.dropped[0].reason == "there are no tokens"


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    for name, colour in (("red/1.png", (255, 0, 0)), ("blue/1.png", (0, 0, 255)), ("blue/grey.png", 128)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB" if isinstance(colour, tuple) else "L", (5, 3), colour).save(tmp_path / name)
    return tmp_path


def test_images_are_read_when_they_are_asked_for(pictures):
    made = prepare(pictures, processor)
    assert (made.task, made.label_names, made.tokens) == ("image-classification", ["blue", "red"], 3)
    batch = made.batch([2, 0, 1])
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [128, 128, 128]]
    before = made.fingerprint
    (pictures / "red/1.png").write_bytes((pictures / "blue/1.png").read_bytes())
    assert prepare(pictures, processor).fingerprint != before


def test_every_form_of_an_image_is_the_same_image(pictures):
    from PIL import Image

    path = pictures / "red/1.png"
    array = np.asarray(Image.open(path))
    forms = [str(path), path, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, {"path": str(path)}]
    forms += [Image.open(path), array, array.transpose(2, 0, 1), torch.tensor(array)]
    for form in forms:
        assert np.array_equal(np.asarray(open_image(form, "here")), array)


def test_a_transformers_processor_is_used_as_such(pictures):
    from transformers import ViTImageProcessor

    vit = ViTImageProcessor(size={"height": 6, "width": 6})
    image = open_image(pictures / "red/1.png", "here")
    ours = pixels(image, vit)
    assert ours.shape == (3, 6, 6)
    assert torch.equal(ours, vit(images=image, return_tensors="pt")["pixel_values"][0])


def test_a_model_with_an_encoder_gets_prompt_and_answer_apart(spaced):
    rows = [{"prompt": "aQ", "completion": "bc"}, {"prompt": "a", "completion": "abcd" * 3}]
    made = prepare(rows, spaced, task="seq2seq", max_length=8)
    assert spaced.convert_ids_to_tokens(made[0]["input_ids"]) == ["<s>", "▁a", "Q"]
    assert spaced.convert_ids_to_tokens(made[0]["labels"]) == ["<s>", "▁b", "c", "<eos>"]
    assert (made.lengths.tolist(), made.truncated) == ([7, 10], [False, True])
    batch = made.batch([0, 1])
    assert batch["input_ids"].shape == (2, 3)
    assert batch["labels"].shape == (2, 8)
    assert batch["labels"][0, 4:].tolist() == [-100] * 4
    assert prepare(rows, spaced, task="seq2seq", template="Q{prompt}")[1]["input_ids"] == spaced("Qa")["input_ids"]
    with pytest.raises(UserError, match="the columns are text; a model with an encoder needs prompt and completion"):
        prepare([{"text": "a"}], spaced, task="seq2seq")
    for template in ("chat", "{{ messages }}"):
        with pytest.raises(UserError, match="a chat template was given, and a model with an encoder takes no"):
            prepare(rows, spaced, task="seq2seq", template=template)


def test_an_empty_prompt_gives_an_encoder_nothing(words):
    rows = [{"prompt": "", "completion": "a"}, {"prompt": "a", "completion": "b"}]
    assert prepare(rows, words, task="seq2seq").dropped[0].reason == "the prompt is empty"


BAD = [
    ("one class", [{"text": "a", "label": "x"}] * 2, {}, 'every row has the label "x"; expected at least two'),
    (
        "null label",
        [{"text": "a", "label": "x"}, {"text": "a", "label": None}],
        {},
        r'data\[1\]: column "label" is null',
    ),
    ("list label", [{"text": "a", "label": ["x"]}], {}, r"data\[0\]: the label is a list; expected a name or a number"),
    ("empty label", [{"text": "a", "label": ""}], {}, "the label is an empty text"),
    ("missing label", [*TEXTS, {"text": "a"}], {}, r'data\[3\]: there is no column "label"'),
    (
        "label not a number",
        TEXTS,
        {"task": "regression"},
        r'data\[0\]: the label is "yes"; regression expects a finite',
    ),
    ("infinite", [{"text": "a", "label": 0.5}, {"text": "b", "label": "inf"}], {}, r'data\[1\]: the label is "inf"'),
    ("no text", [{"label": "a"}], {"task": "classification"}, "the columns are label; expected text, or a pair"),
    ("names twice", TEXTS, {"label_names": ["a", "a"]}, "the label names are a, a; expected at least two different"),
    ("number beyond names", [{"text": "a", "label": 7}], {"label_names": ["a", "b"]}, r'"7" is not one of the 2 known'),
    ("tags missing", [{"tokens": ["a", "b"], "tags": ["X"]}], {}, r"2 tokens and 1 tags; expected one tag for each"),
    ("tags a number", [{"tokens": ["a"], "tags": 3}], {}, r'column "tags" holds a number; expected a list'),
    ("tokens not texts", [{"tokens": [1], "tags": ["X"]}], {}, "not every token is a text"),
]


@pytest.mark.parametrize(("rows", "options", "sentence"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_label_gives_one_sentence(words, rows, options, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(rows, words, **options)


BAD_IMAGES = [
    ("missing.png", r'data\[0\]: there is no image file "missing\.png"'),
    (b"no image", r"data\[0\]: the image is broken or of an unknown kind"),
    (3, r"data\[0\]: the image is a number; expected a path"),
    (np.zeros((2, 2, 5), np.uint8), r"an array \(2, 2, 5\) of uint8; expected \(H, W\)"),
    (np.zeros((2, 2)), r"an array \(2, 2\) of float64; expected .* of uint8"),
]


@pytest.mark.parametrize(("image", "sentence"), BAD_IMAGES)
def test_a_bad_image_gives_one_sentence(image, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare([{"image": image, "label": "a"}], processor, label_names=["a", "b"])


def test_a_broken_image_stops_the_run_before_it_starts(pictures):
    whole = (pictures / "red/1.png").read_bytes()
    (pictures / "red/1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"red/1\.png: the image .*red/1\.png\" is broken"):
        prepare(pictures, processor)
    with pytest.raises(UserError, match="returned a text; expected a tensor"):
        pixels(None, lambda image: "a")
