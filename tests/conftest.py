"""For all tests: the tiny models of the contract, a cache of their own, and no progress bars."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contract"))
os.environ.setdefault("VENEER_CACHE", str(Path(tempfile.gettempdir()) / "veneer-test-cache"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
