"""The site: made pages say what registry, docstrings and results say; nothing is loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

from veneer.core import registry
from veneer.report import pages


def test_a_ruled_table_becomes_a_table():
    text = """First ``x*y`` line_a.

    ====  ======
    name  start
    ====  ======
    A     U(0, 1)
    B     0, or
          else | 1
    ====  ======

    Last."""
    assert pages.markdown(text).split("\n") == [
        "First `x*y` line\\_a.", "", "",
        "| name | start |", "| --- | --- |", "| A | U(0, 1) |", "| B | 0, or else \\| 1 |",
        "", "", "Last.",
    ]  # fmt: skip


def test_every_docstring_becomes_markdown_without_leftovers():
    for method in registry.methods():
        made = pages.markdown(method.cls.__doc__)
        assert not re.search(r"^=+( +=+)+$", made, re.M), method.name
        tables = re.findall(r"^(\|.+\|)\n\|( ---:? \|)+\n((?:\|.+\|\n?)+)", made, re.M)
        ruled = len(re.findall(r"^ *=+(?: +=+)+$", method.cls.__doc__, re.M))
        assert len(tables) == ruled // 3, method.name


def test_a_method_page_has_its_fields_and_its_claim():
    record = {
        "name": "lora", "claim": "It is *thin*.", "verdict": "shown", "sentence": "Shown: 0.9 against 0.8.", "seeds": 3,
        "contestants": {"lora": {"lr": 1e-2, "at_edge": True, "test": {"mean": 0.912345, "sd": 0.01}}},
    }  # fmt: skip
    page = pages.method_page(registry.find("lora"), [record])
    for expected in (
        "# lora",
        "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)",
        "| `rank` | `8` | inner dimension r; ≥ 1 |",
        "> It is \\*thin\\*.",
        "**Shown:** 0.9 against 0.8.",
        "| lora | 0.01* | 0.9123 ± 0.01 |",
        "[pissa](pissa.md)",
    ):
        assert expected in page, expected
    assert "Not tried yet." in pages.method_page(registry.find("lora"))


def test_a_sum_is_listed_exactly_when_the_parser_takes_it():
    assert "pissa" in pages.beside("dora")["init"] and "pissa" not in pages.beside("bitfit").get("init", ())


def test_claims_are_found_by_the_method_they_are_of(tmp_path):
    for name in ("lora_plus", "sara-idle", "pretraining"):
        (tmp_path / f"000_{name}.json").write_text(json.dumps({"name": name, "verdict": "shown"}))
    assert set(pages.claims_by_method(tmp_path, ["lora-plus", "lora", "sara"])) == {"lora-plus", "sara", "pretraining"}


def test_claims_are_listed_by_verdict():
    record = {"claim": "It *helps*.", "verdict": "not shown", "sentence": "Not shown: 0.8 against 0.9.", "name": "a"}
    found = {"lora": [record], "other": [record | {"verdict": "shown", "sentence": "Shown: 0.9."}]}
    made = pages.claims_list(found, ["lora"])
    assert made[0] == "2 claims: 1 shown, 1 not shown."
    assert [line for line in made if line.startswith("#")] == ["## Shown", "## Not shown"]
    assert "- **[lora](methods/lora.md)**: *It \\*helps\\*.* 0.8 against 0.9." in made
    assert "- **other**: *It \\*helps\\*.* 0.9." in made


def test_quick_benches_are_not_listed():
    figure = {
        "what": "a step",
        "value": 0.5,
        "unit": "",
        "low": 0.4,
        "high": 0.6,
        "runs": 7,
        "target": "≤ 1",
        "met": True,
    }
    record = {
        "name": "step",
        "figures": [figure],
        "machine": {"processor": "P", "cores": 2},
        "versions": {"torch": "2"},
    }
    made = pages.benches([record])
    assert made[0] == "## One training step, beside PEFT's" and len(made) == 6
    assert made[4] == "| a step | 0.5 | 0.4\u00a0–\u00a00.6 | 7 | ≤ 1 (met) |"
    assert pages.benches([record | {"quick": True}]) == []
    cases = [figure | {"what": f"{name}: a step", "runs": 1} for name in ("lora", "dora", "full")]
    cases[2] |= {"value": 2.0, "met": False}
    grid = pages.benches([record | {"figures": [*cases, figure | {"what": "alone"}]}])
    assert grid[2:7] == [
        "|  | a step, ≤ 1 |",
        "| --- | ---: |",
        "| lora | 0.5 |",
        "| dora | 0.5 |",
        "| full | 2 missed |",
    ]
    assert grid[8].startswith("| what |") and grid[10].startswith("| alone | 0.5 |")
    assert pages.machines([record]) == "P, 2 cores, torch 2"


def test_the_interchange_table_says_why_not():
    rows = {row.split("]")[0][3:]: row for row in pages.interchange_table(registry.methods())[2:]}
    assert "| yes | yes | LORA, read and written |" in rows["lora"]
    assert "no: the magnitudes scale whole rows" in rows["dora"]


class Loads(HTMLParser):
    """What a page loads by itself when it is opened."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        loads = {"script": "src", "img": "src", "link": "href", "iframe": "src"}.get(tag)
        if loads and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get(loads) or "")


def test_the_site_has_a_page_for_every_method(site):
    assert {m.name for m in registry.methods()} == {path.stem for path in (site / "methods").glob("*.html")}


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loads = Loads()
        loads.feed(path.read_text(encoding="utf-8"))
        assert [link for link in loads.found if re.match(r"(https?:)?//", link)] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path.name


def test_made_tables_stand_in_their_places(site):
    assert not [path.name for path in site.rglob("*.html") if "<!-- made:" in path.read_text(encoding="utf-8")]
    assert "own PEFT kind" in (site / "interchange.html").read_text(encoding="utf-8")
