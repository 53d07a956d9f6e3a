"""Reading: what comes out of each kind of source, and the sentence that each broken one gives."""

import json
import pickle

import numpy as np
import pytest

from veneer.data.read import read_rows
from veneer.errors import UserError

ROWS = [{"text": "one", "label": "a"}, {"text": "zwei, drei", "label": "b"}, {"text": 'vier\n"fünf"', "label": "a"}]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, all holding ROWS."""
    import pandas

    frame = pandas.DataFrame(ROWS)
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS).replace("\n", "\n\n"))
    (tmp_path / "lines.json").write_text(jsonl(ROWS))
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0], ensure_ascii=False).encode())
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "semicolons.csv", index=False, sep=";")
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "lines.json", "a.json", "a.csv", "semicolons.csv", "a.tsv", "a.parquet"])
def test_every_file_kind_gives_the_same_rows(folder, name):
    assert list(read_rows(folder / name)) == ROWS
    assert list(read_rows(str(folder / name), limit=2)) == ROWS[:2]


def test_objects_give_the_same_rows(folder):
    import datasets
    import pandas

    for source in (ROWS, iter(ROWS), datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS), read_rows(ROWS)):
        assert list(read_rows(source)) == ROWS
    assert list(read_rows(folder / "bom.jsonl")) == ROWS[:1]


def test_a_frame_gives_null_and_lists_as_a_file_does(tmp_path):
    import pandas

    rows = [{"instruction": "a", "input": None, "tags": ["x", "y"]}, {"instruction": "b", "input": "c", "tags": ["z"]}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert (
        list(read_rows(pandas.read_parquet(tmp_path / "a.parquet"))) == list(read_rows(tmp_path / "a.parquet")) == rows
    )


def test_rows_know_their_place(folder):
    assert read_rows(folder / "a.jsonl").where(1).endswith("a.jsonl, line 3")  # a blank line between any two
    assert read_rows(folder / "a.csv").where(2).endswith("a.csv, line 4")
    assert read_rows(folder / "a.parquet").where(1).endswith("a.parquet, row 2")
    assert read_rows(ROWS).where(1) == "data[1]"


def test_a_field_of_several_lines_does_not_shift_line_numbers(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",a\nthree\n')
    with pytest.raises(UserError, match=r"a\.csv, line 4: 1 fields; expected 2 \(text, label\)"):
        read_rows(tmp_path / "a.csv")


def test_a_document_longer_than_the_csv_modules_bound_is_read(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_text_rows_are_the_lines_that_are_not_blank(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\n\n  two\n")
    rows = read_rows(tmp_path / "a.txt")
    assert list(rows) == [{"text": "one"}, {"text": "  two"}]
    assert rows.where(1).endswith("line 3")


def test_a_folder_of_images_gives_paths_and_classes(tmp_path):
    for name in ("dog/2.png", "dog/1.PNG", "cat/1.jpg", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    rows = read_rows(tmp_path)
    assert [(row["image"].rsplit("/", 2)[1:], row["label"]) for row in rows] == [
        (["cat", "1.jpg"], "cat"), (["dog", "1.PNG"], "dog"), (["dog", "2.png"], "dog")
    ]  # fmt: skip
    assert rows.where(0).endswith(", cat/1.jpg")


def test_class_names_of_a_datasets_object_are_kept():
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    assert read_rows(datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features)).label_names == {
        "label": ["no", "yes"]
    }


def test_a_limit_stops_before_what_is_broken(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert len(read_rows(tmp_path / "a.jsonl", limit=1)) == 1


GOOD = '{"text": "a"}\n'
BAD_FILES = [
    ("broken line", "a.jsonl", GOOD * 16 + '{"text": "b"\n', r"a\.jsonl, line 17: broken JSON \(Expecting ','"),
    ("cut short", "a.jsonl", GOOD + '{"text": "unfin', r"line 2: broken JSON \(Unterm.*: \{\"text\": \"unfin; "),
    ("not an object", "a.jsonl", GOOD + '["a"]\n', r"line 2: a list; expected an object with named columns"),
    ("a bare text", "a.jsonl", '"a"\n', r"line 1: a text; expected an object"),
    ("a list as lines", "a.jsonl", '[\n{"text": "a"}\n]', r"line 1: a JSON list; expected one object a line"),
    ("nested too deep", "a.jsonl", '{"a":' * 100_000, r"line 1: broken JSON \(too deep\).*one whole object a line"),
    ("empty", "a.jsonl", "", r"a\.jsonl is empty; expected at least one row"),
    ("blank lines only", "a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
    ("empty list", "a.json", "[]", r"a\.json holds no rows"),
    ("object of many lines", "a.json", '{"data":\n[1],\n"v": 2}', r"one object with data, v; expected a list"),
    ("broken list", "a.json", '[{"text": "a"},\n{"text" "b"}]', r"a\.json, line 2: broken JSON \(Expecting ':'"),
    ("list of numbers", "a.json", "[{}, 2]", r"a\.json, row 2: a number; expected an object"),
    ("a number", "a.json", "3", r"a\.json: holds a number; expected a list of objects"),
    ("Latin-1", "a.jsonl", GOOD.encode() + '{"text": "é"}\n'.encode("latin-1"), r"line 2: byte 0xe9 at position 11"),
    ("UTF-16", "a.csv", "text\na\n".encode("utf-16"), r"written in UTF-16; expected UTF-8"),
    ("zero bytes", "a.txt", b"a\nb\0\n", r"line 2: holds a zero byte"),
    ("too many fields", "a.csv", "text,label\na,b\na,b,c\n", r"line 3: 3 fields; expected 2 \(text, label\); put"),
    ("open quote", "a.csv", 'text\na\n"b\nc\n', r"line 3: broken CSV .*check the double quotes"),
    ("header only", "a.csv", "text,label\n", r"holds a header \(text, label\) and no rows"),
    ("nameless column", "a.csv", "text,,c\na,b,c\n", r"line 1: column 2 has no name"),
    ("column twice", "a.csv", "text,text\na,b\n", r'column "text" appears twice'),
    ("broken Parquet", "a.parquet", b"PAR1 and then nothing", r"a\.parquet is not a whole Parquet file \("),
    ("pickle", "a.pkl", pickle.dumps(ROWS), r"a\.pkl is a pickle, which can run code"),
    ("weights", "a.bin", b"x", r"a\.bin is a pickle"),
    ("unknown kind", "a.xlsx", b"x", r'a\.xlsx is of a kind that is not read \("\.xlsx"\); expected \.jsonl'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), [b[1:] for b in BAD_FILES], ids=[b[0] for b in BAD_FILES])
def test_a_bad_file_gives_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_file_offers_the_nearest_name(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match=r'no file ".*trian\.jsonl"; did you mean "train\.jsonl"\?'):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r'no folder "tatsu-lab" to read alpaca from; hub data sets'):
        read_rows("tatsu-lab/alpaca")


BAD_FOLDERS = [
    ([], "is an empty folder"),
    (["a.csv", "b.txt"], "holds no images but a.csv, b.txt; expected a data file"),
    (["1.png"], r"holds images of no class \(1.png …\)"),
    (["train/cat/1.png", "val/cat/1.png"], "folders of folders; give one of them, such as .*train"),
]


@pytest.mark.parametrize(("files", "sentence"), BAD_FOLDERS)
def test_a_bad_folder_gives_one_sentence(tmp_path, files, sentence):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=sentence):
        read_rows(tmp_path)


BAD_OBJECTS = [
    ([], "data holds no rows"),
    ([{"text": "a"}, "b"], r"data\[1\]: a text; expected an object"),
    ({"train": ROWS, "test": ROWS}, "the data is a dict with train, test; expected one list of rows"),
    (3, "the data is a number; expected"),
    (None, "the data is null; expected"),
    (np.zeros(2), r"data\[0\]: a float64; expected an object"),
]


@pytest.mark.parametrize(("source", "sentence"), BAD_OBJECTS)
def test_a_bad_object_gives_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence):
        read_rows(source)
    with pytest.raises(UserError, match="limit is 0; expected at least 1"):
        read_rows(ROWS, limit=0)
