"""The core stays small, and no file grows past what a person reads in one sitting."""

from pathlib import Path

import veneer

HOUSE = Path(veneer.__file__).parent
AXES = ("deltas", "inits", "ranks", "optim", "objectives", "bases", "sides", "mixtures")


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_core_is_under_two_thousand_lines():
    assert sum(lines(p) for p in (HOUSE / "core").glob("*.py")) < 2000


def test_no_file_is_over_five_hundred_lines():
    assert not [p for p in HOUSE.rglob("*.py") if lines(p) > 500]


def test_a_method_is_at_most_three_hundred_lines():
    assert not [p for axis in AXES for p in (HOUSE / axis).glob("*.py") if lines(p) > 300]
