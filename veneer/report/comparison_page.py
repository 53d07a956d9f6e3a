"""A comparison as one self-contained HTML page: no script, no network, pictures inside, for screen, phone and paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.report.comparison import MEASURED, best_of, cells_of, columns, cost_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --ground: #ffffff; --quiet: #57606a; --line: #d0d7de; --tint: #f6f8fa; --good: #116329;
  --bad: #a40e26 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --ground: #0d1117; --quiet: #9198a1; --line: #3d444d; --tint: #151b23; --good: #56d364;
    --bad: #ff9492 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 64rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; text-wrap: balance }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
h3 { font-size: .95rem; margin: 1.1rem 0 .4rem } h3::first-letter { text-transform: uppercase }
p, ul { max-width: 44rem; text-wrap: pretty } .quiet { color: var(--quiet) } .note { font-size: .88rem }
ul { padding-left: 1.15rem } li { margin: .25rem 0 }
.short { border-left: 3px solid var(--line); padding-left: 1rem; margin: 1rem 0 } .short h2 { margin-top: 0 }
.short ul { margin: 0; padding-left: 1.1rem }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; width: fit-content; max-width: 100% }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .42rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { border-top: 0; background: var(--tint); font-weight: 600; white-space: normal; vertical-align: bottom }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground); font-weight: 500 }
thead th:first-child { background: var(--tint); font-weight: 600 } .tests th:nth-child(2) { text-align: left }
tr.before > * { color: var(--quiet) } td.best { font-weight: 700 }
td.said { text-align: left; white-space: normal; min-width: 8.5rem; line-height: 1.3 }
td.better { color: var(--good) } td.worse { color: var(--bad) }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0;
  max-width: none; font-size: .9rem }
.legend svg { width: .8em; height: .8em; margin-right: .45em; overflow: visible }
.pictures { display: grid; gap: .4rem 1.2rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)) }
figure { margin: .8rem 0 1.6rem } .pictures svg { width: 100%; max-width: 30rem; height: auto; display: block }
figcaption { color: var(--quiet); font-size: .88rem; max-width: 44rem; margin-top: .3rem; text-wrap: pretty }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .2rem 1rem; margin: .3rem 0;
  font-size: .88rem }
dt { color: var(--quiet) } dd { margin: 0 } code { font: .92em ui-monospace, monospace }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem } th, td { padding: .4rem .6rem }
}
@media print {
  :root { --quiet: #444; --line: #bbb; font-size: 10pt }
  body { max-width: none; padding: 0 } h2, h3 { break-after: avoid } figure, tr, .short { break-inside: avoid }
  .scroll { overflow: visible } th, td { padding: .25rem .55rem }
  .pictures { grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)) } .pictures svg { max-width: none }
}
"""
CAPTIONS = {
    "scores": "Means with 95 % intervals over the seeds; each seed is a tick. The arrow points to the better side.",
    "pareto": "Means with 95 % intervals against what they cost. The dashed line joins the recipes that no other beats "
    "in both means.",
    "curves": "Training loss, smoothed, mean of the seeds: over steps, the same batches for all, and over time.",
}
WORDS = {
    "held-out loss": "nats a token (or a row) on rows that neither training nor the search saw",
    "exact": "share of held-out prompts answered to the letter",
    "edits": "words to change in the answers, over the words there are",
    "general text": "nats a token on ordinary text; where it rises, something was forgotten",
    "drift": "how far the predictions on that text moved from the base's own, KL divergence in nats a token",
}
HEADS = {"general text": "loss on general text"}
COST = {
    "parameters": "trained parameters",
    "rank": "rank",
    "lr": "learning rate",
    "s a run": "s a run",
    "peak": "peak memory",
}
MARKS = {  # of matplotlib's letters, in a box of 10
    "o": '<circle cx="5" cy="5" r="4.4"/>', "s": '<path d="M1 1h8v8H1z"/>', "^": '<path d="M5 .4 9.8 9.2H.2z"/>',
    "D": '<path d="M5 0 10 5 5 10 0 5z"/>', "v": '<path d="M5 9.6.2.8h9.6z"/>', "*": '<path d="M5 0 6.2 3.8 10 3.8 7 '
    '6.2 8 10 5 7.7 2 10 3 6.2 0 3.8 3.8 3.8z"/>', "P": '<path d="M3.3 0h3.4v3.3H10v3.4H6.7V10H3.3V6.7H0V3.3h3.3z"/>',
    "X": '<path d="M2.4 0 5 2.6 7.6 0 10 2.4 7.4 5 10 7.6 7.6 10 5 7.4 2.4 10 0 7.6 2.6 5 0 2.4z"/>',
}  # fmt: skip


def page(summary: dict[str, Any], panels: dict[str, list[tuple[str, Figure]]]) -> str:
    """The page of a summary; ``panels`` as `comparison_plots.panels` gives them."""
    about, facts = summary["about"], summary["facts"]
    setting = about["setting"]
    count = len(summary["recipes"])
    title = f"{count} recipe{'s' * (count > 1)} on {Path(setting['model']).name}"
    seeds = about["seeds"]
    lead = (
        f"Each recipe got {summary['budget']}, the seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}, the same "
        f"batches in the same order, and {_search(about)}. It is scored on {facts['held_out_rows']} held-out rows that "
        "no choice was made on."
    )
    drawn = [_pictures(name, panels[name]) for name in CAPTIONS if panels.get(name)]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet note">{escape(Path(setting["data"]).name)} · {escape(summary["ended"])}</p>',
        f"<p>{escape(lead)}</p>",
        f'<section class="short"><h2>In short</h2>{_list(_short(summary))}</section>',
        "<h2>Results</h2>",
        _results(summary),
        _meanings(summary),
        "<h2>What it cost</h2>",
        _costs(summary),
        f'<p class="quiet note">{escape(_sentence(cost_line(summary)))}</p>',
        _tests(summary),
        *(["<h2>Pictures</h2>", _legend(summary["recipes"]), *drawn] if drawn else []),
        "<h2>How it was run</h2>",
        _facts(setting, facts),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
    )
    return f"{head}<body><main>{''.join(parts)}</main></body></html>\n"


def _search(about: dict[str, Any]) -> str:
    if about["search"]:
        return f"a search of {about['search']} learning rates on validation rows"
    return "its usual learning rate" if about["lr"] is None else f"the learning rate {about['lr']:g}"


def _short(summary: dict[str, Any]) -> list[str]:
    alone = [] if len(summary["recipes"]) > 1 else ["One recipe alone: there is nothing to compare it with."]
    return [*alone, *summary["short"], *summary["notes"]]


def _results(summary: dict[str, Any]) -> str:
    shown, best = [c for c in columns(summary) if c in MEASURED], best_of(summary)
    lines = []
    if summary["before"]:
        known = {c: summary["before"].get(MEASURED[c]) for c in shown}
        cells = [("", "" if value is None else f"{value:.3f}") for value in known.values()]
        lines.append(_line("before training", cells, "before"))
    for row in summary["rows"]:
        cells = cells_of(row)
        lines.append(_line(row["recipe"], [("best" * (best.get(c) == row["recipe"]), cells[c]) for c in shown]))
    return _table(["recipe", *(HEADS.get(c, c) for c in shown)], lines)


def _meanings(summary: dict[str, Any]) -> str:
    """What stands in the columns, in words."""
    known = [f"{HEADS.get(c, c)}: {WORDS[c]}" for c in columns(summary) if c in WORDS]
    interval = "± is half of the 95 % interval of the mean over the seeds; the best mean is bold."
    return f'<p class="quiet note">{escape(" ".join([interval, *map(_sentence, known)]))}</p>'


def _costs(summary: dict[str, Any]) -> str:
    lines = []
    for row in summary["rows"]:
        cells, search = cells_of(row), row["search"]
        searched = f"{search['runs']} runs, {search['seconds']:.0f} s" if search["runs"] else ""
        lines.append(_line(row["recipe"], [*(("", cells[c]) for c in COST), ("", searched)]))
    return _table(["recipe", *COST.values(), "search for the rate"], lines)


def _tests(summary: dict[str, Any]) -> str:
    """What may be claimed: a table for each measure that was tested."""
    if not summary["tests"]:
        return ""
    parts = []
    for name, found in summary["tests"].items():
        lines, halves = [], [(t["high"] - t["low"]) / 2 for t in found if t["pairs"] > 1]
        typical = statistics.median(halves) if halves else 0.0
        digits = min(6, max(3 * (typical < 1), 1 - math.floor(math.log10(typical)))) if typical > 0 else 3
        for test in found:
            said = {"no difference": "no difference can be claimed", "one seed": "one seed: nothing can be claimed"}
            words, cells = said.get(test["outcome"], test["outcome"]), [("", text) for text in _figures(test, digits)]
            lines.append(_line(test["recipe"], [(f"said {test['outcome']}", words), *cells]))
        head = [f"against {found[0]['against']}", "what may be said", "difference", "95 % interval", "p, adjusted"]
        parts.append(f"<h3>{escape(name)}</h3>{_table(head, lines, 'tests')}")
    why = (
        "Paired t tests over the seeds against the first recipe, p adjusted for the number of recipes (Holm). A "
        "difference is claimed where p is below 0.05 and the interval leaves out 0; where none can be claimed, two "
        "recipes need not be equal."
    )
    return f'<h2>What may be claimed</h2><p class="quiet note">{why}</p>{"".join(parts)}'


def _figures(test: dict[str, Any], digits: int) -> list[str]:
    """The difference, its interval and p."""
    mean, low, high = (f"{test[k]:+.{digits}f}".replace("-", "−") for k in ("mean", "low", "high"))
    if test["pairs"] < 2:
        return [mean, "–", "–"]
    return [mean, f"{low} to {high}", "< 0.001" if test["p"] < 0.001 else f"{test['p']:.3f}"]


def _line(name: str, cells: Iterable[tuple[str, str]], kind: str = "") -> str:
    made = "".join(f"<td{_class(k)}>{escape(text)}</td>" for k, text in cells)
    return f'<tr{_class(kind)}><th scope="row">{escape(name)}</th>{made}</tr>'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _table(head: Sequence[str], lines: Iterable[str], kind: str = "") -> str:
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    made = f"<table{_class(kind)}><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll">{made}</div>'


def _legend(recipes: Sequence[str]) -> str:
    from veneer.report.comparison_plots import looks

    items = [
        f'<li><svg viewBox="0 0 10 10" fill="{look.colour}" aria-hidden="true">{MARKS[look.marker]}</svg>'
        f"{escape(recipe)}</li>"
        for recipe, look in looks(recipes).items()
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _pictures(name: str, found: Sequence[tuple[str, Figure]]) -> str:
    from veneer.report.comparison_plots import svg

    drawn = []
    for k, (what, figure) in enumerate(found):
        text = svg(figure).replace("<svg", f'<svg role="img" aria-label="{escape(what)}"', 1)
        for mark in ('id="', 'href="#', "url(#"):  # several drawings on one page must not share names
            text = text.replace(mark, f"{mark}{name}{k}-")
        drawn.append(text)
    made = f'<div class="pictures">{"".join(drawn)}</div>'
    return f"<figure>{made}<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text[:1].upper()}{text[1:]}."


def _facts(setting: dict[str, Any], facts: dict[str, Any]) -> str:
    machine = dict(facts["hardware"])
    if isinstance(machine.get("memory"), int):
        machine["memory"] = f"{machine['memory'] / 2**30:.1f} GiB"
    found = {name.replace("_", " "): escape(str(value)) for name, value in setting.items() if value not in (None, 0)}
    for name, value in facts.items():
        if not isinstance(value, dict):
            code = name == "base" or name.endswith("fingerprint")
            found[name.replace("_", " ")] = f"<code>{escape(str(value))}</code>" if code else escape(f"{value}")
    for group, values in (("hardware", machine), ("versions", facts["versions"])):
        found[group] = escape(", ".join(f"{k} {v}" for k, v in values.items()))
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in found.items()) + "</dl>"
