"""What selects modules and says numbers of them in a config that is written: the shortest that means them exactly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.site import Site
from veneer.io.peft_config import first_match, selects
from veneer.models import architecture

TASKS = {  # what a class of transformers is called at its end → PEFT's task type
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

# The heads that PEFT adds to modules_to_save by itself for a task, and then wants to find in the file.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def head(adapter: Adapter, kind: str, sites: list[Site]) -> dict[str, Any]:
    """The fields that every kind has."""
    model = adapter.model
    return {
        "peft_type": kind,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "task_type": task(model),
        "target_modules": targets(model, [s.path for s in sites]),
    }


def task(model: nn.Module) -> str | None:
    """PEFT's word for what the model does, by its class."""
    bases = [c.__name__ for c in type(model).__mro__]
    return next((word for end, word in TASKS.items() if any(b.endswith(end) for b in bases)), None)


def targets(model: nn.Module, paths: Iterable[str]) -> list[str] | str:
    """The shortest ``target_modules`` that selects exactly ``paths``: last names, whole paths, or an expression."""
    paths = list(paths)
    modules = [p for p, _ in architecture.named_modules(model) if p]
    names: list[str] = []
    for last in dict.fromkeys(p.rpartition(".")[2] for p in paths):
        meant = [p for p in paths if p.rpartition(".")[2] == last]
        names += [last] if set(meant) == {m for m in modules if selects(m, [last], {})} else meant
    if {m for m in modules if selects(m, names, {})} == set(paths):
        return names
    return "|".join(re.escape(p) for p in paths)


def pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most common value, a pattern for the modules that have another), such that each finds its own."""
    common = Counter(values.values()).most_common(1)[0][0]
    other = {path: v for path, v in values.items() if v != common}
    if all((other[k] if (k := first_match(other, path)) is not None else common) == v for path, v in values.items()):
        return common, other
    return common, {f"^{re.escape(path)}": v for path, v in other.items()}


def whole_number(value: float) -> int | float:
    """The whole number that ``value`` is but for rounding, else itself."""
    near = round(value)
    return near if abs(value - near) <= 1e-9 * max(1, abs(near)) else value
