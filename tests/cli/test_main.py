"""The command line as a whole: what it lists, how fast it answers, how it says no."""

import re
import resource
import subprocess
import sys

import pytest
import typer

from veneer.cli import main

COMMANDS = ["demo", "train", "compare", "plan", "inspect", "data", "eval", "chat", "export", "serve", "methods"]


def veneer(capsys, *arguments):
    """(exit status, standard output, standard error) of a command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main.run([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def seconds(*arguments, tries):
    """The processor's seconds of a whole process, the fewest of some tries: other work on the machine adds to both."""
    taken = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "veneer.cli", *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_lists_the_commands_that_work_and_no_other(capsys):
    status, out, _ = veneer(capsys, "--help")
    assert status == 0
    assert re.findall(r"^  (\w+)  ", out.split("Commands:")[1], re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_is_explained(command):
    for option in typer.main.get_command(main.app).commands[command].params:
        assert len((option.help or "").split()) > 1, option.name


def test_no_argument_at_all_shows_the_help(capsys):
    assert veneer(capsys)[1] == veneer(capsys, "--help")[1]


def test_help_takes_less_than_half_a_second():
    assert seconds("--help", tries=5) < 0.5


def test_the_catalogue_takes_less_than_three_seconds():
    assert seconds("methods", tries=3) < 3.0


def test_help_imports_nothing_heavy():
    script = (
        "import sys, veneer.cli.main; heavy = {'torch', 'transformers', 'accelerate', 'matplotlib', 'numpy', 'rich'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


MISTAKES = {
    "unknown command": (["trian"], "did you mean 'train'"),
    "unknown option": (["train", "--modell", "x"], "--modell"),
    "option without a value": (["train", "--model"], "--model"),
    "missing option": (["train", "--model", "smollm2-135m"], "--data"),
    "word for a number": (
        ["train", "--model", "m", "--data", "d", "--lr", "fast"],
        "'--lr': Input should be a valid number",
    ),
    "number out of range": (["train", "--model", "m", "--data", "d", "--lr", "-1"], "greater than 0"),
    "unknown choice": (["train", "--model", "m", "--data", "d", "--precision", "fp8"], "'fp8' is not one of 'auto'"),
    "steps and epochs": (["train", "--model", "m", "--data", "d", "--steps", "3", "--epochs", "1"], "one of them"),
    "missing data": (["train", "--model", "smollm2-135m", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "resume without a folder": (["train", "--model", "m", "--data", "d", "--resume"], "--out"),
    "unknown method": (["methods", "lorra"], 'did you mean "lora"'),
    "unknown axis": (["methods", "--axis", "detla"], "delta, init"),
    "argument too many": (["methods", "lora", "dora"], "dora"),
    "unknown format": (["export", "--model", "m", "--adapter", "a", "--format", "onnx", "--out", "o"], "onnx"),
    "unknown model": (["chat", "--model", "./no-such-folder"], "no-such-folder"),
    "data of an unknown kind": (["data", "--data", __file__], ".jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_status_2(capsys, name):
    arguments, words = MISTAKES[name]
    status, out, err = veneer(capsys, *arguments)
    assert status == 2
    assert words in err and out == ""
    assert err.startswith("veneer: ") and err.count("\n") == 1 and "Traceback" not in err


def test_interrupting_is_status_130(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("veneer.core.registry.methods", stop)
    status, _, err = veneer(capsys, "methods")
    assert status == 130 and err == "veneer: interrupted\n"


def test_a_full_disk_is_one_sentence(capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "runs/1/run.jsonl")

    monkeypatch.setattr("veneer.core.registry.methods", full)
    status, _, err = veneer(capsys, "methods")
    assert status == 2 and "runs/1/run.jsonl" in err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("veneer.core.registry.methods", broken)
    with pytest.raises(ZeroDivisionError):
        main.run(["methods"])


def test_a_reader_that_stops_early_is_no_error():
    script = f"{sys.executable} -m veneer.cli methods | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
