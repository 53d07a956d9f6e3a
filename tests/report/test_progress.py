"""The panel of a run, and which display suits which stream."""

import io

import pytest
from rich.console import Console

from veneer.report import progress


def values(step, **more):
    return {
        "step": step, "total": 10, "loss": 2.0 / step, "lr": 1e-3, "tokens_per_second": 1234.5,
        "peak_memory": 3 * 2**30, "eta": 75.0, **more,
    }  # fmt: skip


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)


def test_panel_shows_every_number_of_a_step():
    console = terminal()
    panel = progress.Panel(console)
    panel.start(10, {"trains": "lora"})
    for step in (1, 2, 3):
        panel.step(values(step))
    panel.step(values(4, eval_loss=0.625))
    panel.event("checkpoint written")
    panel.end({"held_out": {"before": 3.0, "after": 0.625}, "warnings": ["2 factors are still at zero"]})
    text = console.file.getvalue()
    for expected in (
        "trains lora", "4/10", "0.5000", "1.00e-03", "1,234 tokens/s", "3.00 GiB", "1:15 left", "0.6250", "at step 4",
        "checkpoint written", "3.0000 → 0.6250", "2 factors are still at zero", "▁",
    ):  # fmt: skip
        assert expected in text


def test_an_event_with_brackets_is_not_taken_for_markup():
    console = terminal()
    progress.Panel(console).event("sites model.layers.[0-3] matched nothing")
    assert "[0-3]" in console.file.getvalue()


def test_closing_twice_is_harmless():
    panel = progress.Panel(terminal())
    panel.start(1, {})
    panel.close()
    panel.close()


def test_a_run_that_fails_gives_the_cursor_back():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    with pytest.raises(ZeroDivisionError), progress.showing(Screen()) as panel:
        panel.console = terminal()
        panel.start(3, {})
        raise ZeroDivisionError
    assert panel.console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_a_pipe_gets_lines_and_quiet_gets_nothing(capsys):
    from veneer.train.display import Lines, Silent

    assert isinstance(progress.display(io.StringIO()), Lines)
    assert isinstance(progress.display(quiet=True), Silent)


def test_a_terminal_gets_the_panel():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(progress.display(Screen()), progress.Panel)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([1.0], 10, "▁"),
        ([0, 1], 10, "▁█"),
        ([0, 0, 7, 7], 2, "▁█"),
        (list(range(8)), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline_spans_its_range(values, width, expected):
    assert progress.sparkline(values, width) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(-3, "0:00"), (59.9, "0:59"), (61, "1:01"), (3661, "1:01:01")])
def test_clock(seconds, expected):
    assert progress.clock(seconds) == expected
