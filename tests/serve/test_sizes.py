"""Numbers of rows: few, never too small, and nothing for who asks; mapped weights leave memory and come back."""

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from veneer.serve.mapped import give_back, ranges, resident
from veneer.serve.sizes import filled, numbers, whole


@given(st.integers(1, 20_000))
def test_rows_are_filled_up_by_less_than_a_tile_or_a_quarter(rows):
    most = filled(rows)
    assert rows <= most < max(rows + 16, 1.25 * rows) and filled(most) == most
    assert whole(rows) <= rows < whole(rows) + max(16, 0.25 * rows)
    assert rows < 16 or filled(whole(rows)) == whole(rows)


def test_steps_of_up_to_288_rows_have_thirteen_sizes():
    assert numbers(288) == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]


def mapped(folder):
    save_file({"W": torch.arange(4_000_000.0), "b": torch.ones(3)}, folder / "x.safetensors")
    return load_file(folder / "x.safetensors")


def held(folder):
    """Bytes of files in a folder that this process has in memory through mappings."""
    found, within = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            within = str(folder) in line
        elif within and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_what_is_mapped_leaves_memory_and_is_read_again(tmp_path):
    tensors = mapped(tmp_path)
    total = tensors["W"].double().sum()
    assert held(tmp_path) > 15e6 and resident() > 15e6
    give_back(tensors.values())
    assert held(tmp_path) < 1e6
    assert tensors["W"].double().sum() == total


def test_what_was_changed_in_memory_is_left_alone(tmp_path):
    tensors = mapped(tmp_path)
    tensors["W"][5] = -1
    assert ranges(tensors.values()) == []
    give_back(tensors.values())
    assert tensors["W"][5] == -1
