"""Files are whole or not there: a write that fails leaves the old content, and damaged files are told by name."""

import json
import os
import resource
import struct

import pytest
import torch
from safetensors.torch import save_file

from veneer.errors import UserError
from veneer.io.files import (
    PREVIOUS,
    read_json,
    read_tensors,
    staged,
    sweep,
    typed,
    write_json,
    write_tensors,
    write_whole,
)


def write_pair(directory, value, fail=None):
    with staged(directory, last=("b.json",), keep=("a.txt",)) as scratch:
        (scratch / "a.txt").write_text(value)
        if fail:
            raise fail
        write_json(scratch / "b.json", {"value": value})


def content(directory):
    return {p.name: p.read_text() for p in directory.iterdir()}


def test_a_new_directory_appears_whole(tmp_path):
    write_pair(tmp_path / "new", "x")
    assert sorted(content(tmp_path / "new")) == ["a.txt", "b.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("fail", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_what_was_there(fail, tmp_path):
    write_pair(tmp_path / "d", "old")
    (tmp_path / "d" / "mine.txt").write_text("kept")
    before = content(tmp_path / "d")
    with pytest.raises(UserError if isinstance(fail, OSError) else type(fail)):
        write_pair(tmp_path / "d", "new", fail)
    with pytest.raises(UserError if isinstance(fail, OSError) else type(fail)):
        write_pair(tmp_path / "fresh", "new", fail)
    assert content(tmp_path / "d") == before
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_other_files_in_the_directory_stay(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("kept")
    write_pair(tmp_path / "d", "new")
    assert sorted(content(tmp_path / "d")) == ["a.txt", "b.json", "mine.txt"]


def test_a_save_killed_between_two_files_keeps_the_old_one_aside(tmp_path, monkeypatch):
    write_pair(tmp_path / "d", "old")
    replace = os.replace

    def die_on_json(a, b):
        if str(b).endswith("b.json"):
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", die_on_json)
    with pytest.raises(KeyboardInterrupt):
        write_pair(tmp_path / "d", "new")
    assert content(tmp_path / "d")["a.txt" + PREVIOUS] == "old"
    assert json.loads(content(tmp_path / "d")["b.json"]) == {"value": "old"}


@pytest.fixture
def small_files():
    """Files of more than 4,000 bytes cannot be written: the kernel's stand-in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path, small_files):
    path = tmp_path / "t.safetensors"
    write_whole(path, lambda p: write_tensors(p, {"a": torch.zeros(10)}))
    with pytest.raises(UserError, match=r"cannot write .*t\.safetensors.*untouched"):
        write_whole(path, lambda p: write_tensors(p, {"a": torch.zeros(10_000)}))
    assert torch.equal(read_tensors(path)["a"], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_leavings_of_killed_writers_are_swept(tmp_path):
    (tmp_path / ".d.123.partial").mkdir()
    (tmp_path / ".f.123.partial").write_text("x")
    (tmp_path / "d").mkdir()
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_tensors_come_back_bit_for_bit_though_they_share_memory(tmp_path):
    whole = torch.randn(6, 4)
    tensors = {"view": whole.T, "whole": whole, "same": whole, "half": whole.bfloat16(), "one": torch.tensor(3)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    back = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


def test_a_header_that_looks_like_a_pickles_first_byte_is_read(tmp_path):
    """The eight bytes of length may start with 0x80, as pickles do."""
    for pad in range(300):
        save_file({"a": torch.zeros(2)}, tmp_path / "t.safetensors", metadata={"p": "x" * pad})
        read_tensors(tmp_path / "t.safetensors")


def _truncated(path):
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-8])


def _cut_header(path):
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:30])


def _pickle(path):
    torch.save({"a": torch.zeros(2)}, path)


def _old_pickle(path):
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


DAMAGED = {
    "cut short": (_truncated, "cut short: it has .* of .* bytes"),
    "cut in the header": (_cut_header, "cut short"),
    "empty": (lambda p: p.write_bytes(b""), "cut short"),
    "a pickle": (_pickle, "is a pickle"),
    "an old pickle": (_old_pickle, "is a pickle"),
    "text": (lambda p: p.write_text("hello there, this is no tensor file at all"), "not a safetensors file"),
    "a git-lfs pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "a GGUF file": (lambda p: p.write_bytes(b"GGUF" + bytes(60)), "is a GGUF file"),
    "a broken header": (lambda p: p.write_bytes(struct.pack("<Q", 20) + b'{"a": [1, 2, 3, 4]}  '), "header is damaged"),
    "missing": (lambda p: None, "is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_tensor_file_is_told_in_one_sentence(kind, tmp_path):
    make, words = DAMAGED[kind]
    make(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=words) as told:
        read_tensors(tmp_path / "t.safetensors")
    assert "t.safetensors" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,}', "line 1, column"),
        ('{\n"a": \n', "line 3"),
        ("[1, 2]", "holds a list; a JSON object"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_damaged_json_file_is_told_with_its_line(text, words, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as told:
        read_json(path)
    assert "c.json" in str(told.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "has no field 'r'; a whole number was expected"),
        ({"r": "8"}, r"r is text \('8'\); a whole number"),
        ({"r": True}, "r is true or false"),
        ({"r": 8.5}, "r is a number"),
    ],
)
def test_a_mistyped_field_is_told_with_what_was_expected(content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        typed(content, "r", (int,), tmp_path / "c.json")
