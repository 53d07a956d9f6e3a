"""What ``veneer inspect`` shows: tables for the terminal and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

INK, ACCENT, QUIET, SHADE = "#1f4e79", "#c55a11", "#7f7f7f", "#f3e3d6"
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head", "other")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> Table:
    """Numbers to the right, the columns in ``words`` to the left."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, justify="left" if name in words else "right")
    for row in rows:
        made.add_row(*row)
    return made


def layers_table(report: dict[str, Any]) -> Table:
    """The norm report by attention layer; columns of the adapter's share only where it has one."""
    tuned = any(row["change"] or row["delta_q"] or row["delta_k"] or row["delta_v"] for row in report["layers"])
    columns = [
        "block",
        "max |S|",
        "over ln L",
        "spread, median",
        "heads below/at/above",
        "rank 99 %",
        "entropy",
        "side",
    ]
    columns += ["moved by", "Δ of q, k, v"] if tuned else []
    rows = []
    for row in report["layers"]:
        sides = row["heads"]["side"]
        cells = [
            _block(row["block"]), f"{row['M']:.1f}", f"{row['ratio']:.2f}", f"{row['D_median']:.1f}",
            "/".join(str(sides.count(name)) for name in ("below", "transition", "above")),
            "–" if row["rank_99"] is None else f"{row['rank_99']:.0f}", f"{row['entropy']:.2f}", row["side"],
        ]  # fmt: skip
        moved = [f"{row['change']:+.3f}", ", ".join(f"{row[f'delta_{r}']:.2g}" for r in "qkv")]
        rows.append(cells + (moved if tuned else []))
    return table(columns, rows, words=("side",))


def lengths_table(found: Sequence[dict[str, Any]]) -> Table:
    """The sweep over lengths: where the threshold goes, where the scores go."""
    rows = [
        [str(f["tokens"]), f"{f['threshold']:.2f}", f"{f['M']:.1f}", f"{f['ratio']:.2f}"]
        + [str(f[name]) for name in ("below", "transition", "above")]
        for f in found
    ]
    return table(["tokens L", "ln L", "median max |S|", "over ln L", "below", "transition", "above"], rows)


def spectra_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Spectra of the weights: a line for each block, effective ranks as shares of the full rank, by role."""
    roles = [role for role in ROLES if any(row["role"] == role for row in rows)]
    blocks = sorted({row["block"] for row in rows}, key=lambda b: (b is None, b))
    cell = {(row["block"], row["role"]): row for row in rows}
    lines = []
    for block in blocks:
        own = [cell.get((block, role)) for role in roles]
        lines.append([_block(block), *("" if c is None else f"{c['share']:.2f}  {c['top']:.1f}" for c in own)])
    return table(["block", *roles], lines)


def adapter_table(groups: Sequence[dict[str, Any]], by: str = "block") -> Table:
    """By block or role: drift, spike, effective rank, intruders and their energy, what a fold into bf16 would do."""
    columns = (by, "sites", "drift %", "spike", "effective rank", "intruders", "energy %")
    rows = [
        [_block(b[by]), str(b["sites"]), f"{100 * b['drift']:.2f}", f"{b['spike']:.3f}"]
        + [f"{b['effective_rank']:.1f}", str(b["intruders"]), f"{100 * b['energy']:.1f}"]
        + [f"{100 * b['fold_error']:.1f}", f"{100 * b['unmoved']:.1f}"]
        for b in sorted(groups, key=lambda g: ROLES.index(g[by]) if g[by] in ROLES else 0)
    ]
    return table([*columns, "bf16 fold loses %", "leaves alone %"], rows, words=("role",))


def tried_table(found: Sequence[dict[str, Any]]) -> Table:
    """Intruders scaled, and in brackets the whole change scaled to the same norm, by score."""
    names = list(found[0]["scores"])
    rows = [
        [f"{f['factor']:g}", f"{f['uniform']:.3f}"]
        + [f"{f['scores'][name]:.4f}  ({f['control'][name]:.4f})" for name in names]
        for f in found
    ]
    return table(["intruders ×", "same norm ×", *names], rows)


def pairs_table(pairs: Sequence[dict[str, Any]], role_of: dict[str, str]) -> Table:
    """Two adapters by role: mean cosine of their changes, mean overlap of their leading directions."""
    rows = []
    for role in [r for r in ROLES if r in role_of.values()]:
        own = [p for p in pairs if role_of.get(p["path"]) == role]
        if own:
            means = (sum(p[name] for p in own) / len(own) for name in ("cosine", "overlap"))
            rows.append([role, str(len(own)), *(f"{mean:.3f}" for mean in means)])
    return table(["role", "sites", "cosine", "subspace overlap"], rows, words=("role",))


def _block(block: int | str | None) -> str:
    return "–" if block is None else str(block)


# -- pictures ----------------------------------------------------------------------------------------------------------


def save_pictures(found: dict[str, Any], folder: str | Path) -> list[Path]:
    """``drift.png``, ``intruders.png`` of each adapter, ``scores.png``, ``spectra.png`` where there is something."""
    from veneer.io.files import write_whole

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Figure] = {}
    adapters = found.get("adapters", {})
    for number, (name, report) in enumerate(adapters.items(), 1):
        end = f"-{number}" if len(adapters) > 1 else ""
        figures[f"drift{end}"] = drift(report, title=f"{Path(name).name}: {report['recipe']}")
        figures[f"intruders{end}"] = directions(report, title=f"{Path(name).name}: {report['recipe']}")
        if "limits" in report:
            figures[f"scores{end}"] = scores(report["limits"])
    if "limits" in found:
        figures["scores"] = scores(found["limits"])
    if "spectra" in found:
        figures["spectra"] = weights(found["spectra"])
    if "tried" in found:
        figures["tried"] = trade(found["tried"])
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        write_whole(paths[-1], lambda scratch, figure=figure: figure.savefig(scratch, format="png", dpi=150))
    return paths


def drift(report: dict[str, Any], title: str = "") -> Figure:
    """Drift by block and role, and the mean spectrum of ΔW by role."""
    figure, (left, right) = _figure(2)
    for role, color in _colors(r["role"] for r in report["sites"]):
        own = [r for r in report["sites"] if r["role"] == role]
        inside = sorted((r["block"], 100 * r["drift"]) for r in own if r["block"] is not None)
        left.plot(*zip(*inside), marker=".", color=color, label=role) if inside else None
        length = min(len(r["spectrum"]) for r in own)
        mean = [sum(r["spectrum"][k] for r in own) / len(own) for k in range(length)]
        shown = [(k + 1, value) for k, value in enumerate(mean) if value > 0]
        right.plot(*zip(*shown), marker=".", color=color, label=role) if shown else None
    left.set(xlabel="block", ylabel="‖ΔW‖ over ‖W‖, %", ylim=(0, None))
    right.set(xlabel="component", ylabel="singular value of ΔW, mean of the sites")
    if right.lines:
        right.set_yscale("log")
        right.legend(frameon=False, ncols=2)
    left.set_title(title, loc="left", fontsize=11)
    return figure


def directions(report: dict[str, Any], title: str = "") -> Figure:
    """How near the leading directions of W + ΔW are to the base's, all sites together, and intruders by block."""
    figure, (left, right) = _figure(2)
    near = [c for r in report["sites"] for c in r["similarity"]]
    left.hist(near, bins=[k / 25 for k in range(26)], color=INK)
    left.axvline(report["epsilon"], color=ACCENT, linewidth=1.5, label=f"intruders below {report['epsilon']:g}")
    left.set(xlabel="cosine to the nearest singular vector of W", ylabel="leading directions", xlim=(0, 1))
    left.legend(frameon=False, loc="upper left")
    blocks = [b for b in report["blocks"] if b["block"] is not None]
    right.bar([b["block"] for b in blocks], [b["intruders"] for b in blocks], color=ACCENT)
    right.set(xlabel="block", ylabel="intruder dimensions", ylim=(0, max([1, *(b["intruders"] for b in blocks)])))
    left.set_title(title, loc="left", fontsize=11)
    return figure


def scores(report: dict[str, Any], title: str = "") -> Figure:
    """Scores by layer, a dot a head, with the transition as a band."""
    figure, (axes,) = _figure(1)
    layers, threshold = report["layers"], report["threshold"]
    axes.axhspan(0.5 * threshold, 2 * threshold, color=SHADE, label="transition, 0.5 to 2 × ln L")
    axes.axhline(threshold, color=ACCENT, linewidth=1, label=f"ln {report['tokens']}")
    for k, row in enumerate(layers):
        heads = row["heads"]["M"]
        axes.plot([k] * len(heads), heads, ".", color=QUIET, markersize=4, label="a head" if k == 0 else None)
    axes.plot([row["M"] for row in layers], color=INK, label="largest |score| of the layer")
    axes.plot([row["D_median"] / 2 for row in layers], color=INK, linestyle=":", label="half the usual row's spread")
    if any(row["change"] for row in layers):
        axes.plot([row["M_base"] for row in layers], color=ACCENT, linestyle="--", label="without the adapter")
    axes.set(xlabel="attention layer", ylabel="score before softmax", ylim=(0, None))
    axes.set_title(title or "Attention scores and the threshold of fast gradients", loc="left", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def weights(rows: Sequence[dict[str, Any]]) -> Figure:
    """Effective ranks of the weights themselves, as shares of the full rank."""
    figure, (axes,) = _figure(1)
    for role, color in _colors(r["role"] for r in rows):
        own = sorted((r["block"], r["share"]) for r in rows if r["role"] == role and r["block"] is not None)
        axes.plot(*zip(*own), marker=".", color=color, label=role) if own else None
    axes.set(xlabel="block", ylabel="effective rank over full rank", ylim=(0, 1))
    axes.set_title("Spectra of the weights", loc="left", fontsize=11)
    if axes.lines:
        axes.legend(frameon=False, ncols=4)
    return figure


def trade(found: Sequence[dict[str, Any]]) -> Figure:
    """The first score against the last: with intruders scaled, and with the whole change scaled to the same norm."""
    figure, (axes,) = _figure(1)
    names = list(found[0]["scores"])
    x, y = names[-1], names[0]
    for what, label, color, style in (
        ("scores", "intruders scaled", INK, "-"),
        ("control", "whole change scaled to the same norm", ACCENT, "--"),
    ):
        points = [(f[what][x], f[what][y]) for f in found]
        axes.plot(*zip(*points), marker="o", markersize=5, color=color, linestyle=style, label=label)
    for f in found:
        axes.annotate(f"{f['factor']:g}", (f["scores"][x], f["scores"][y]), xytext=(5, 5), textcoords="offset points")
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False)
    axes.set_title("What smaller intruders cost and bring back, by their factor", loc="left", fontsize=11)
    return figure


def _colors(roles: Any) -> list[tuple[str, Any]]:
    from matplotlib import colormaps

    present = set(roles)
    return [(role, colormaps["tab10"](k)) for k, role in enumerate(ROLES) if role in present]


def _figure(panels: int) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * panels if panels > 1 else 8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
