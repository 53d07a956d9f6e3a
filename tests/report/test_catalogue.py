"""The page of methods and the tables of the terminal say what the registry says."""

import io
from typing import Annotated

from rich.console import Console

from veneer.core import registry
from veneer.core.registry import Method
from veneer.fields import At, Fields
from veneer.report import catalogue, tables


class Thin(Fields):
    """A thin layer.

    y = xW + s·xAB
    """

    rank: Annotated[int, At(ge=1, doc="inner dimension")] = 8
    share: Annotated[float, At(gt=0, lt=1, doc="kept", unit="of the rows")] = 0.5
    reasons = {"folds": "its branch is not linear"}


THIN = Method("thin", "delta", Thin, "arXiv:0000.00000", wants=("pair",), defaults="lora")


def text_of(renderable):
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()


def test_a_method_is_described_by_its_class():
    page = catalogue.page([THIN])
    for expected in (
        "### `thin`",
        "- paper: arXiv:0000.00000",
        "- wants: pair",
        "- fills absent axes with: lora",
        "- folds: no, its branch is not linear",
        "| `rank` | `8` | inner dimension; ≥ 1 |",
        "| `share` | `0.5` | kept; of the rows; > 0, < 1 |",
        "y = xW + s·xAB",
    ):
        assert expected in page


def test_the_page_has_every_registered_method_once():
    page = catalogue.page(registry.methods())
    for method in registry.methods():
        assert page.count(f"### `{method.name}`\n") == 1


def test_the_page_is_written_where_it_is_asked_for(tmp_path, capsys):
    path = tmp_path / "docs" / "methods.md"
    assert catalogue.main([str(path)]) == 0
    assert path.read_text(encoding="utf-8") == catalogue.page(registry.methods())
    assert catalogue.main([]) == 2 and "usage" in capsys.readouterr().err


def test_the_table_of_methods_has_a_line_for_each():
    out = text_of(tables.methods_table([THIN]))
    assert all(word in out for word in ("thin", "delta", "arXiv:0000.00000", "pair", "A thin layer."))


def test_examples_are_cut_to_one_line_each():
    out = text_of(tables.examples_table([tables.Example("q", "yes", "a\nb" + "c" * 99, "yes")], width=10))
    assert "a bccccccc…" not in out and "a bcccccc…" in out


def test_scores_of_two_models_show_the_change():
    out = text_of(tables.scores_table({"base": {"loss": 3.0}, "with adapter": {"loss": 1.5}}))
    assert out.splitlines()[-1].split() == ["loss", "3.0000", "1.5000", "-1.5000"]
    assert "change" not in text_of(tables.scores_table({"base": {"loss": 3.0}}))


def test_rows_that_train_nothing_are_named():
    facts = {
        "task": "causal", "rows": 8, "kept": 1, "tokens": 10, "trained": 5, "share_trained": 0.5, "longest": 10,
        "truncated": 0, "lengths": [(16, 1)], "labels": None,
        "dropped": [{"where": f"d.jsonl, line {n}", "reason": "the completion is empty"} for n in range(7)],
    }  # fmt: skip
    out = text_of(tables.data_table(facts))
    assert "1 of 8 train" in out and "d.jsonl, line 4: the completion is empty" in out and "and 2 more" in out
