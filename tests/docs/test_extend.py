"""The worked example of "Add a method" is under fifty lines and passes the contract that every method must pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from snippets import ROOT, blocks

PAGE = ROOT / "docs" / "extend.md"


def example():
    (found,) = (b for b in blocks(PAGE) if b.title)
    return found


def test_the_example_is_under_fifty_lines():
    assert len(example().text.splitlines()) < 50


def test_the_example_passes_the_contract(tmp_path):
    (tmp_path / "gated_example.py").write_text(example().text, encoding="utf-8")
    options = ["-o", "addopts=--import-mode=importlib", "-p", "gated_example", "-k", "gated-llama"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "tests/contract", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 10
