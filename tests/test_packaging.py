"""What a fresh clone promises: packages that are whole, make targets, the licence, the README's commands."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = ["setup", "demo", "test", "lint", "bench", "docs"]


def test_every_folder_with_code_is_a_package():
    folders = {path.parent for path in (ROOT / "veneer").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_veneer_command_is_the_command_line():
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "veneer"]
    from veneer.cli.main import run

    assert script.load() is run


def test_public_names_resolve():
    import veneer

    assert [name for name in veneer.__all__ if not callable(getattr(veneer, name))] == []


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_without_a_python_says_what_is_missing(tmp_path):
    done = subprocess.run(
        ["make", "demo", "PYTHON=", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "no Python 3.11 or newer" in done.stderr


def test_the_readme_names_commands_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from typer.main import get_command

    from veneer.cli.main import app

    commands = get_command(app).commands
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)) <= set(TARGETS)
    for line in re.findall(r"^veneer (.+)$", text, re.MULTILINE):
        words = line.split()
        known = {flag for p in commands[words[0]].params for flag in [*p.opts, *p.secondary_opts]}
        assert [w for w in words if w.startswith("--") and w not in known] == [], line


def test_the_readme_links_to_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_no_path_of_a_machine_is_in_the_text():
    files = [ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci/run", ROOT / "pyproject.toml"]
    assert [f.name for f in files if re.search(r"/(root|home|work|tmp)/", f.read_text(encoding="utf-8"))] == []
