"""What ``--check`` promises is what the process takes, within 5 %."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_resident_memory_is_as_promised():
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "resident.py")],
        capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["free"] <= 8, "of 800 pages: traffic that writes all but a hundredth"
    assert found["taken"] == pytest.approx(found["promised"], rel=0.05)
