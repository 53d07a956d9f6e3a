"""A comparison as one self-contained HTML page: no script, no network, pictures inside, for screen, phone and paper."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from veneer.report.comparison import best_of, cells_of, columns, cost_line

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --ground: #ffffff; --quiet: #57606a; --line: #d0d7de; --tint: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --ground: #0d1117; --quiet: #9198a1; --line: #3d444d; --tint: #151b23 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
h3 { font-size: .95rem; margin: .8rem 0 .2rem; } h3::first-letter { text-transform: uppercase }
.claims { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 0 1.6rem }
.claims ul { margin: 0; padding-left: 1.1rem; font-size: .88rem; line-height: 1.4 } .claims li { margin: .25rem 0 }
p, li { max-width: 46rem } .quiet { color: var(--quiet) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { border-top: 0; background: var(--tint) } th:first-child, td:first-child { text-align: left }
td.best { font-weight: 700 }
figure { margin: 1rem 0 } figure > div { overflow-x: auto } figure svg { width: 100%; min-width: 34rem; height: auto }
figcaption { color: var(--quiet); font-size: .88rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .88rem } dd { margin: 0 }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem } }
@media print { body { max-width: none; font-size: 11pt } figure { break-inside: avoid }
  .scroll, figure > div { overflow: visible } figure svg { min-width: 0 } table { font-size: 8pt } }
"""
CAPTIONS = {
    "scores": "Means with 95 % intervals over the seeds; each seed is a tick. The arrow points to the better side.",
    "steps": "Training loss over optimiser steps, mean of the seeds, smoothed.",
    "seconds": "The same over the seconds of training.",
    "pareto": "Held-out loss against what it cost; the dashed line joins what nothing else beats in both.",
}


def page(summary: dict[str, Any], pictures: dict[str, str]) -> str:
    """The page of a summary; ``pictures`` are SVG texts by name."""
    about, facts = summary["about"], summary["facts"]
    setting = about["setting"]
    count = len(summary["recipes"])
    title = f"{count} recipe{'s' * (count > 1)} on {Path(setting['model']).name}"
    lead = (
        f"Each recipe got {summary['budget']}, the seeds {', '.join(map(str, about['seeds']))}, the same batches in "
        f"the same order, and {_search(about)}. Held out: {facts['held_out_rows']} rows that no choice was made on."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(Path(setting["data"]).name)} · {escape(summary["ended"])}</p>',
        f"<p>{escape(lead)}</p>",
        "<h2>Results</h2>",
        _table(summary),
        f'<p class="quiet">{escape(cost_line(summary))}</p>',
        "<h2>What may be claimed</h2>",
        _claims(summary),
        *(f'<p class="quiet">{escape(note)}</p>' for note in summary["notes"]),
        "<h2>Pictures</h2>",
        *(_picture(pictures[name], caption) for name, caption in CAPTIONS.items() if name in pictures),
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


def _table(summary: dict[str, Any]) -> str:
    shown, best = columns(summary), best_of(summary)
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in shown)
    rows = []
    for row in summary["rows"]:
        cells = cells_of(row)
        marked = [' class="best"' if best.get(c) == row["recipe"] else "" for c in shown]
        rows.append("<tr>" + "".join(f"<td{m}>{escape(cells[c])}</td>" for c, m in zip(shown, marked)) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _claims(summary: dict[str, Any]) -> str:
    tested = {s for found in summary["claims"].values() for s in found}
    rest = [s for s in summary["words"] if s not in tested]
    if not summary["words"]:
        rest = ["One recipe alone: there is nothing to compare it with."]
    parts = [f"<div><h3>{escape(name)}</h3>{_list(found)}</div>" for name, found in summary["claims"].items()]
    return (_list(rest) if rest else "") + f'<div class="claims">{"".join(parts)}</div>'


def _picture(svg: str, caption: str) -> str:
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return f"<figure><div>{named}</div><figcaption>{escape(caption)}</figcaption></figure>"


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _facts(setting: dict[str, Any], facts: dict[str, Any]) -> str:
    found = {name.replace("_", " "): value for name, value in setting.items() if value not in (None, 0)}
    found |= {name.replace("_", " "): value for name, value in facts.items() if not isinstance(value, dict)}
    for group in ("hardware", "versions"):
        found[group] = ", ".join(f"{k} {v}" for k, v in facts[group].items())
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in found.items()) + "</dl>"
