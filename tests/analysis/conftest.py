"""A two-layer Llama of whole words, as a transformers folder, and questions about colours."""

import json

import pytest

WORDS = ["say", "the", "colour", "of", "sky", "grass", "rose", "red", "blue", "green"]
PAIRS = [("sky", "blue"), ("grass", "green"), ("rose", "red")]


@pytest.fixture(scope="session")
def words_model(word_model):
    return word_model


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
