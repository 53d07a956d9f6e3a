"""Pages of the documentation site that are made when it is built: methods, what was found of their claims, tables.

Everything comes from the registry, docstrings, ``bench/claims/*.json`` and ``bench/results/*.json``.
"""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from veneer.errors import UserError
from veneer.report.catalogue import FORMS, TITLES, exactly_lora, fields, parameters

Record = Mapping[str, Any]
SEVERAL = 3  # cases from which figures of one quantity become a column
BENCHES = {  # titles of the benches' tables
    "cli": "The command line's quick commands",
    "forms": "Each form's step and kept bytes, beside PEFT's",
    "job": "A whole fine-tuning job, beside TRL with PEFT",
    "load": "Loading the packaged model",
    "memory": "Memory of methods that claim to save it",
    "memory_kept": "Bytes kept for backward",
    "optim": "A step with each optimiser, beside LoRA with AdamW",
    "plan": "What plan foretells, against what runs take",
    "serve-base": "Serving: adapters beside the engine alone",
    "serve-counts": "Serving: tokens a second against the number of adapters",
    "serve-gguf": "Serving: our GGUF adapters in llama.cpp",
    "serve-latency": "Serving: latency",
    "serve-llama": "Serving: beside llama.cpp's server",
    "serve-loading": "Serving: reading an adapter",
    "serve-memory": "Serving: memory promised and taken",
    "serve-peft": "Serving: beside PEFT's mixed batches",
    "serve-scale": "Serving: a thousand adapters",
    "serve-vllm": "Serving: our adapters in vLLM's reader",
    "starts": "Starts of the factors",
    "step": "One training step, beside PEFT's",
}


# -- docstrings --------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Text in which Markdown finds nothing of its own; what stands between double backticks becomes code."""
    parts = re.split(r"``(.+?)``", text, flags=re.S)
    plain = [re.sub(r"([*_\[\]#|\\])", r"\\\1", part).replace("<", "&lt;") for part in parts]
    return "".join(f"`{part}`" if k % 2 else plain[k] for k, part in enumerate(parts))


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its tables, ruled with ``=``, become tables, everything else stays text."""
    blocks, lines, found = [], inspect.cleandoc(docstring).split("\n"), 0
    while found < len(lines):
        if _ruler(lines[found]):
            end = max(k for k in range(found, found + _rows(lines[found:])) if _ruler(lines[k])) + 1
            blocks += ["", *_table(lines[found:end]), ""]
            found = end
        else:
            blocks.append(escaped(lines[found]))
            found += 1
    return "\n".join(blocks).strip()


def _ruler(line: str) -> bool:
    return bool(re.fullmatch(r"=+( +=+)+", line))


def _rows(lines: Sequence[str]) -> int:
    """Lines of the paragraph that a table is."""
    return next((k for k, line in enumerate(lines) if not line.strip()), len(lines))


def _table(lines: Sequence[str]) -> list[str]:
    """A ruled table; a row whose first cell is empty goes on with the row above."""
    spans = [m.span() for m in re.finditer(r"=+", lines[0])]
    ends = [start for start, _ in spans[1:]] + [None]
    rows: list[list[str]] = []
    for line in (line for line in lines if not _ruler(line)):
        cells = [line[start:end].strip() for (start, _), end in zip(spans, ends)]
        if not cells[0] and rows:
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells)]
        else:
            rows.append(cells)
    return table([escaped(cell) for cell in rows[0]], [[escaped(cell) for cell in row] for row in rows[1:]])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of a Markdown table; ``right`` names the columns that are numbers."""
    rule = ["---:" if k in right else "---" for k in range(len(header))]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


# -- methods -----------------------------------------------------------------------------------------------------------


def method_page(method: Any, claims: Sequence[Record] = ()) -> str:
    """One method in full: what it is, its tensors and fields, what it stands beside, what was found of its claim."""
    lines = [f"# {method.name}", "", f"*{TITLES[method.axis]}*", ""]
    facts = [
        ("Paper", f"[{method.paper}]({address(method.paper)})" if method.paper else ""),
        ("Written alone it is", f"`{alone(method)}`"),
        ("Parameters a site", escaped(parameters(method))),
        ("Layers", ", ".join(getattr(method.cls, "layers", ()) or ())),
        ("Gives", ", ".join(method.gives)),
        ("Wants", ", ".join(method.wants)),
        ("PEFT", _peft(method)),
    ]
    lines += [f"- **{name}:** {words}" for name, words in facts if words]
    for what, why in (getattr(method.cls, "reasons", None) or {}).items():
        lines.append(f"- **{NOES.get(what, what)}:** no, {escaped(why)}")
    lines += ["", markdown(method.cls.__doc__ or ""), ""]
    rows = [[f"`{name}`", f"`{default}`", escaped(words)] for name, default, words in fields(method)]
    if rows:
        lines += ["## Fields", "", *table(("field", "default", "meaning"), rows), ""]
    lines += _beside(method)
    lines += ["## What its paper claims, tried here", ""]
    found = [line for record in claims for line in claim_section(record)]
    return "\n".join(lines + (found or ["Not tried yet.", ""]))


NOES = {"folds": "Folds into W", "as_lora": "Exact as plain LoRA", "starts_at_base": "Starts at the base"}


def address(paper: str) -> str:
    """Where a paper is."""
    kind, _, rest = paper.partition(":")
    return {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind, "") + (rest or kind)


def alone(method: Any) -> str:
    """The recipe that a method's name alone stands for, in full."""
    from veneer.core import recipe

    try:
        return "+".join(part.method.name for part in recipe.parse(method.name).parts)
    except UserError:
        return method.name


def _peft(method: Any) -> str:
    from veneer.io import peft_mixture
    from veneer.io.peft_config import read_map

    if method.cls is peft_mixture.XLoRA:
        return f"{peft_mixture.KIND}, read and written"
    known = read_map(method)
    if known is None:
        return ""
    return f"{known.type}, read and written" if known.write else f"{known.type}, read; written as plain LoRA"


def _beside(method: Any) -> list[str]:
    """The methods of other axes with which a sum is accepted."""
    lines = []
    for axis in TITLES:
        names = [f"[{name}]({name}.md)" for name in beside(method.name).get(axis, ())]
        if names:
            lines.append(f"- {axis}: {', '.join(names)}")
    said = (
        "Names that may be added to it; a method may still ask for certain layers, forms or data when it is attached."
    )
    return ["## In a sum with", "", said, "", *lines, ""] if lines else []


@cache
def beside(name: str) -> dict[str, tuple[str, ...]]:
    """By axis, the methods that the parser accepts in a sum with this one."""
    from veneer.core import recipe, registry

    own, found = registry.find(name), {}
    for other in registry.methods():
        if other.axis == own.axis:
            continue
        try:
            recipe.parse(f"{name}+{other.name}")
        except UserError:
            continue
        found.setdefault(other.axis, []).append(other.name)
    return {axis: tuple(names) for axis, names in found.items()}


def methods_page(methods: Iterable[Any], claims: Mapping[str, Sequence[Record]]) -> str:
    """The list of all methods by axis, a line each, with the verdict on its claim."""
    found = list(methods)
    axes = len({m.axis for m in found})
    lines = ["# Methods", "", f"{len(found)} methods on {axes} axes; a recipe is a sum of their names.", ""]
    for axis, title in TITLES.items():
        rows = [
            [f"[{m.name}](methods/{m.name}.md)", escaped(m.summary), _verdicts(claims.get(m.name, ()))]
            for m in found
            if m.axis == axis
        ]
        if rows:
            lines += [f"## {title}", "", *table(("method", "what it does", "its claim here"), rows), ""]
    return "\n".join(lines)


def _verdicts(records: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(record["verdict"] for record in records))


# -- claims and benches ------------------------------------------------------------------------------------------------


def records(folder: Path, only: str = "") -> list[Record]:
    """The JSON objects of a folder in the order of their names, of files whose names hold ``only``."""
    paths = [path for path in sorted(folder.glob("*.json")) if only in path.stem.replace("_", "-")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def claims_by_method(folder: Path, names: Iterable[str] = (), only: str = "") -> dict[str, list[Record]]:
    """What was found of each method's claims; of ``sara-idle``, where no method has that name, ``sara`` is the method.

    Underscores in a claim's name are the hyphens of the registry's. ``only`` reads but the files named after a method.
    """
    known, found = set(names), {}
    for record in records(folder, only):
        own = name = record["name"].replace("_", "-")
        while name not in known and "-" in name:
            name = name.rpartition("-")[0]
        found.setdefault(name if name in known else own, []).append(record)
    return found


def claim_section(record: Record) -> list[str]:
    """The claim, the verdict, and the contestants' scores."""
    verdict = record["verdict"].capitalize()
    lines = [f"> {escaped(record['claim'])}", "", f"**{verdict}:** {escaped(_measured(record))}", ""]
    if record.get("note"):
        lines += [escaped(record["note"]), ""]
    contestants = record.get("contestants", {})
    if contestants:
        measures = _shown(contestants)
        rows = [
            [escaped(label), f"{c['lr']:g}{'*' if c['at_edge'] else ''}", *(_cell(c.get(m)) for m in measures)]
            for label, c in contestants.items()
        ]
        right = range(1, 2 + len(measures))
        lines += [*table(("contestant", "rate", *map(escaped, measures)), rows, right), ""]
        edge = " A rate marked \\* is the end of its sweep." if any(c["at_edge"] for c in contestants.values()) else ""
        lines += [f"Means and deviations over {record['seeds']} seeds, at the rate that validation chose.{edge}", ""]
    return lines


def _shown(contestants: Record) -> list[str]:
    """The measures worth a column: not the times of a busy machine, nor what repeats the score."""
    names = dict.fromkeys(
        name for c in contestants.values() for name, v in c.items() if isinstance(v, dict) and "mean" in v
    )
    first = [n for n in ("test", "kept", "train_loss", "parameters") if n in names]
    return first + [n for n in names if n not in (*first, "validation", "seconds", "test_loss", "test_accuracy")]


def _cell(summary: Record | None) -> str:
    if summary is None:
        return ""
    mean, sd = summary["mean"], summary["sd"]
    if float(mean).is_integer() and not sd:
        return f"{mean:,.0f}"
    return f"{mean:.4g}" + (f" ± {sd:.2g}" if sd else "")


def claims_list(found: Mapping[str, Sequence[Record]], methods: Iterable[str] = ()) -> list[str]:
    """All claims by verdict, each with what was measured; lines that read at any width."""
    known, by_verdict = set(methods), {}
    for name, own in sorted(found.items()):
        shown = f"[{name}](methods/{name}.md)" if name in known else escaped(name)
        for record in own:
            words = f"- **{shown}**: *{escaped(record['claim'].rstrip('.'))}.* {escaped(_measured(record))}"
            by_verdict.setdefault(record["verdict"], []).append(words)
    order = [*(v for v in ("shown", "not shown") if v in by_verdict), *sorted(set(by_verdict) - {"shown", "not shown"})]
    counts = ", ".join(f"{len(by_verdict[verdict])} {verdict}" for verdict in order)
    lines = [f"{sum(map(len, by_verdict.values()))} claims: {counts}.", ""]
    for verdict in order:
        lines += [f"## {verdict[:1].upper()}{verdict[1:]}", "", *by_verdict[verdict], ""]
    return lines


def _measured(record: Record) -> str:
    """A claim's sentence without its verdict, which a heading says."""
    verdict = record["verdict"]
    return record["sentence"].removeprefix(verdict.capitalize()).removeprefix(":").strip()


def benches(found: Sequence[Record]) -> list[str]:
    """Every figure of every bench that was run in full, with its target: a heading and tables for each."""
    lines = []
    for record in found:
        figures = () if record.get("quick") else record.get("figures", ())
        grid, rest = _grid(figures)
        if figures:
            lines += [f"## {BENCHES.get(record['name'], record['name'])}", ""]
            lines += [*grid, ""] if grid else []
            lines += [*_figures(rest), ""] if rest else []
    return lines


def _figures(figures: Iterable[Record]) -> list[str]:
    rows = []
    for line in figures:
        target = f"{line['target']} ({'met' if line['met'] else 'missed'})" if line["target"] else ""
        rows.append([escaped(line["what"]), _value(line), _spread(line), str(line["runs"]), target])
    return table(("what", "measured", "quartiles", "runs", "target"), rows, (1, 2, 3))


def _grid(figures: Iterable[Record]) -> tuple[list[str], list[Record]]:
    """Figures named "case: quantity" as a line for each case, where several cases have the quantity; and the others."""
    cases: dict[str, dict[str, Record]] = {}
    count = Counter(line["what"].rpartition(": ")[2] for line in figures if ": " in line["what"])
    quantities, rest = [q for q, n in count.items() if n >= SEVERAL], []
    for line in figures:
        case, _, quantity = line["what"].rpartition(": ")
        if case and quantity in quantities:
            cases.setdefault(case, {})[quantity] = line
        else:
            rest.append(line)
    if not cases:
        return [], rest
    head = []
    for quantity in quantities:
        targets = {own[quantity]["target"] for own in cases.values() if quantity in own} - {"", None}
        head.append(escaped(quantity) + (f", {targets.pop()}" if len(targets) == 1 else ""))
    rows = [[escaped(case), *(_told(own.get(q)) for q in quantities)] for case, own in cases.items()]
    return table(("", *head), rows, range(1, len(head) + 1)), rest


def _told(line: Record | None) -> str:
    """A figure in a cell: its value, its quartiles, and whether it missed its target."""
    if line is None:
        return ""
    spread = _spread(line)
    return _value(line) + (f" ({spread})" if spread else "") + (" missed" if line["target"] and not line["met"] else "")


def _value(line: Record) -> str:
    return f"{line['value']:.4g} {line['unit']}".strip()


def _spread(line: Record) -> str:
    return f"{line['low']:.4g}\u00a0–\u00a0{line['high']:.4g}" if line["runs"] > 1 else ""


def machines(found: Sequence[Record]) -> str:
    """The machines that the benches ran on, in words."""
    seen = dict.fromkeys(
        f"{r['machine']['processor']}, {r['machine']['cores']} cores, torch {r['versions']['torch']}"
        for r in found
        if "figures" in r and not r.get("quick")
    )
    return "; ".join(seen) or "no bench was run in full"


# -- interchange -------------------------------------------------------------------------------------------------------


def interchange_table(methods: Iterable[Any]) -> list[str]:
    """For each form: whether it folds, is plain LoRA exactly, and how it lies in a PEFT directory."""
    rows = []
    for m in methods:
        if m.axis not in FORMS:
            continue
        folds = _said(m, "folds", getattr(m.cls, "folds", False))
        rows.append([f"[{m.name}](methods/{m.name}.md)", folds, _said(m, "as_lora", exactly_lora(m)), _peft(m)])
    return table(("form", "folds, and so merges", "plain LoRA: PEFT, GGUF", "own PEFT kind"), rows)


def _said(method: Any, what: str, yes: bool) -> str:
    reasons = getattr(method.cls, "reasons", None) or {}
    return f"no: {escaped(reasons[what])}" if what in reasons else "yes" if yes else "no"
