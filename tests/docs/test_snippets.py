"""Every command and every piece of Python in the README and the documentation runs, in the order of its page.

The model is a small one under the packaged one's name. What takes minutes (make's targets, benches) is asked of its
parser alone.
"""

import io
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from snippets import PAGES, ROOT, blocks, name

from veneer.cli import main

GIVEN = {  # names that a page takes as known, and what stands for them
    "README.md": "batch = {k: model.get_input_embeddings().weight.new_tensor([[2, 3, 4]]).long() "
    "for k in ('input_ids', 'labels')}",
}


SMALL = {  # said last, which wins: what makes a command quick on the small model
    "train": ["--steps", "4", "--save-every", "4"],
    "compare": ["--steps", "2", "--seeds", "2", "--search", "0", "--batch-size", "4"],
    "plan": ["--batch-size", "2"],
    "serve": ["--check"],
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_everything_on_the_page_runs(page, workplace, monkeypatch):
    from veneer.core import registry

    registry.methods()  # filled first: what is filled while it is patched would be lost
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_systems", dict(registry._systems))
    space = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", space)
    for block in blocks(page):
        where = f"{name(page)}, line {block.line}"
        assert block.language in ("sh", "python", "json", "text"), f"{where}: nothing runs {block.language!r}"
        if block.language == "python":
            run_python(block.text, where, space, GIVEN.get(name(page), ""))
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run_command(line, where, monkeypatch)


def run_python(text, where, space, given):
    if given and re.search(r"\bbatch\b", text):  # made where the model is known
        text = re.sub(r"^(?=.*\(model, batch\))", given + "\n", text, count=1, flags=re.M)
    exec(compile(text, where, "exec"), vars(space))


def run_command(line, where, monkeypatch):
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "veneer":
        assert run_veneer(words[1:], monkeypatch) == 0, f"{where}: {line}"
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {line}: {done.stderr}"
    elif words[:3] == ["python", "-m", "pytest"]:
        assert (ROOT / words[3]).exists(), f"{where}: {line}"
    elif words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{where}: {line}: {done.stderr}"
    else:
        raise AssertionError(f"{where}: the test does not know how to run {words[0]!r}")


def run_veneer(words, monkeypatch):
    if words == ["demo"]:  # minutes; its own test runs it
        words = ["demo", "--help"]
    words += SMALL.get(words[0], [])
    monkeypatch.setattr(sys, "stdin", io.StringIO("say the colour of sky\n/base\nsay the colour of rose\n"))
    with pytest.raises(SystemExit) as stop:
        main.run(words)
    return stop.value.code
