"""Benches in pieces: a result grows by what is measured, and never mixes settings."""

import pytest

from bench import forms, harness, pieces, plan, starts

RUN = {"seconds": 3.0, "memory": 2**20}


def test_what_was_found_with_the_same_settings_alone_is_kept(tmp_path):
    harness.write("forms", {"samples": {"lora": {"kept": 3}}, "settings": {"rank": 16}}, tmp_path)
    assert pieces.earlier("forms", {"rank": 16}, tmp_path) == {"lora": {"kept": 3}}
    assert pieces.earlier("forms", {"rank": 8}, tmp_path) == {}
    assert pieces.earlier("starts", {"rank": 16}, tmp_path) == {}


def test_a_form_has_the_lines_of_what_was_measured_of_it():
    lines = {f.what: f for f in forms.figures("lora", {"kept": 13, "base": 10, "ours": [1.0, 2.0], "peft": [2.0, 2.0]})}
    assert lines["lora: kept over the base's"].met and lines["lora: step over PEFT's"].value == 0.75
    assert [f.what for f in forms.figures("hydra", {"kept": 20, "base": 10})] == ["hydra: kept over the base's"]
    assert forms.figures("hydra", {"kept": 20, "base": 10})[0].met is None  # it needs the output too
    assert forms.figures("nola", {"kept": 20, "base": 10})[0].met is False


def test_a_start_is_timed_against_the_plain_one_of_its_round(monkeypatch):
    took = {"plain": iter([1.0, 2.0]), "pissa": iter([1.5, 2.8])}
    monkeypatch.setattr(starts, "_process", lambda side, name, quick: RUN | {"seconds": next(took[name])})
    monkeypatch.setitem(starts.STARTS, "pissa", starts.STARTS["pissa"]._replace(peft=None))
    monkeypatch.setattr(starts, "PLAIN", starts.PLAIN._replace(peft=None))
    options = type("Options", (), {"quick": True, "add": False, "more": False, "sides": ["veneer"], "only": ["pissa"],
                                   "what": "times", "repeats": 2})  # fmt: skip
    found = {f.what: f for f in starts.measure(options).figures}
    assert found["PiSSA, Veneer"].value == pytest.approx(0.65) and found["PiSSA, Veneer"].met
    assert found["PiSSA, Veneer, memory"].value == 1.0


def test_rounds_of_a_start_add_up_and_a_side_that_is_left_out_stays(monkeypatch):
    monkeypatch.setattr(starts, "_process", lambda side, name, quick: RUN)
    kept = {"eva": {s: {"start": [RUN], "plain": [RUN]} for s in starts.SIDES}}
    monkeypatch.setattr(starts, "earlier", lambda name, settings: kept)
    facts = {
        "quick": True,
        "add": False,
        "more": True,
        "sides": ["peft"],
        "only": ["eva"],
        "what": "times",
        "repeats": 2,
    }
    found = starts.measure(type("Options", (), facts)).samples["eva"]
    assert {side: len(runs["start"]) for side, runs in found.items()} == {"veneer": 1, "peft": 3}


def test_a_forecast_is_off_by_its_distance_from_the_run_either_way():
    sample = {"forecast": {"memory": 9 * 2**20, "step": 1.5}, "run": {"memory": 10 * 2**20, "step": 1.0}}
    memory, step = plan.figures("lora", sample)
    assert memory.value == pytest.approx(0.1) and memory.met
    assert step.value == pytest.approx(0.5) and step.met is False
