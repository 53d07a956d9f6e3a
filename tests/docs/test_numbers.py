"""Numbers that the README and the pages quote are those of the results kept beside the benches."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from snippets import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def measured(bench):
    """The figures of a bench, by what they are of; and the notes beside them."""
    record = json.loads((ROOT / "bench" / "results" / f"{bench}.json").read_text(encoding="utf-8"))
    assert not record["quick"]
    return {f["what"]: f["value"] for f in record["figures"]}


def row(begins):
    """The last cell of the README's row that begins so."""
    (line,) = re.findall(rf"^\| {re.escape(begins)}.*\| ([^|]+) \|$", README, re.M)
    return line


def test_the_readmes_table_of_steps():
    step = measured("step")
    cells = ("LoRA step over the frozen base", "with dropout 0.05", "DoRA step over the frozen base")
    plain, dropout, dora = (f"{step[what]:.2f}" for what in cells)
    peft, ours, dora_ours = (
        f"{step[what]:.2f}"
        for what in ("PEFT's LoRA step over the frozen base", "LoRA step over PEFT's", "DoRA step over PEFT's")
    )
    assert row("one step of 4 × 256") == plain and row("the same with dropout") == f"{dropout}; {dora}"
    assert f"(PEFT: {peft})" in README and row("that step over PEFT's") == f"{ours}; {dora_ours}"


def test_the_readmes_job():
    job = measured("job")
    speed, memory = job["useful tokens/s over TRL's, bf16"], job["peak anonymous memory over TRL's, bf16"]
    assert row("one epoch over 256") == f"{speed:.1f} ×" and row("peak anonymous memory of that") == f"{memory:.2f}"
    ours, theirs = (job[f"held-out loss, {who}"] for who in ("Veneer", "TRL with PEFT, bf16"))
    assert f"after that epoch is {ours:.3f} here, {theirs:.3f} with TRL in bf16" in README


def test_forecasts_are_as_near_as_their_page_says():
    text = (ROOT / "docs" / "how-to" / "plan.md").read_text(encoding="utf-8").replace("\n", " ")
    said = re.search(r"memory was foretold within (\d+) % and step time within (\d+) %", text)
    plan = measured("plan")
    for what, bound in zip(("memory", "step"), map(int, said.groups())):
        worst = 100 * max(value for name, value in plan.items() if f": {what} off" in name)
        assert bound - 1 < worst <= bound
    assert len(plan) == 2 * 13 and "Of thirteen recipes" in text
