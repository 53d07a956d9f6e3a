"""Curves from a run's log: every series is drawn, and the picture is a real PNG."""

import json
import struct

import numpy as np
import pytest

from veneer.errors import UserError
from veneer.report import plots

STEPS = [{"step": s, "loss": 3.0 / s, "lr": 1e-3 * (40 - s) / 40} for s in range(1, 41)]
HELD = [{"step": 0, "eval_loss": 3.1}, {"step": 20, "eval_loss": 0.4}, {"step": 40, "eval_loss": 0.2}]


def log(folder, rows):
    (folder / "run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_series_is_a_line_of_its_own():
    figure = plots.draw([*STEPS, *HELD])
    lines = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    assert set(lines) == {"training loss", "training loss, smoothed", "held-out loss", "learning rate"}
    assert list(lines["held-out loss"].get_xdata()) == [0, 20, 40]
    assert list(lines["held-out loss"].get_ydata()) == [3.1, 0.4, 0.2]
    assert np.allclose(lines["training loss"].get_ydata(), [row["loss"] for row in STEPS])
    assert np.allclose(lines["learning rate"].get_ydata(), [row["lr"] for row in STEPS])


def test_a_run_without_evaluation_has_no_held_out_line():
    labels = {line.get_label() for axes in plots.draw(STEPS).axes for line in axes.lines}
    assert "held-out loss" not in labels


def test_curves_writes_a_png_of_its_full_size(tmp_path):
    log(tmp_path, [*STEPS, *HELD])
    path = plots.curves(tmp_path)
    content = path.read_bytes()
    assert path.name == "curves.png" and content.startswith(b"\x89PNG")
    assert struct.unpack(">II", content[16:24]) == (1200, 720)  # width and height of the IHDR chunk
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert np.allclose(plots.smoothed([2.5] * 50), 2.5)
    falling = [1.0] * 100 + [0.0] * 100
    assert np.allclose(plots.smoothed(falling)[::-1], plots.smoothed(falling[::-1]))
    assert plots.smoothed(falling)[99] > 0.4 and plots.smoothed(falling)[100] < 0.6


@pytest.mark.parametrize(
    ("rows", "words"),
    [(None, "no run.jsonl"), ([], "no training step"), ([{"step": 1, "eval_loss": 2.0}], "no training step")],
)
def test_a_folder_without_a_run_is_refused(tmp_path, rows, words):
    if rows is not None:
        log(tmp_path, rows)
    with pytest.raises(UserError, match=words):
        plots.curves(tmp_path)


def test_a_damaged_log_is_named_with_its_line(tmp_path):
    (tmp_path / "run.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    with pytest.raises(UserError, match=r"run\.jsonl, line 2"):
        plots.curves(tmp_path)
