"""Every form of the registry either loads in PEFT with our outputs or is refused with an offer; so for merging."""

import pytest
import torch
from by_peft import loaded, run
from models import make
from recipes import attached, models_for, moved, name

from veneer.core import registry
from veneer.errors import UserError

FORMS = [(m, kind) for m in registry.methods("delta") for kind in models_for(m) if kind in ("llama", "gpt2", "bert")]


@pytest.mark.parametrize(("method", "kind"), FORMS, ids=name)
def test_peft_gives_our_outputs_or_the_form_is_refused(method, kind, tmp_path):
    case, adapter = attached(method, kind)
    moved(adapter)
    wanted = run(case.model, case.batch)
    try:
        adapter.export(tmp_path / "p", format="peft")
    except UserError as refusal:
        assert "merged" in str(refusal) or "own format" in str(refusal)
        assert not (tmp_path / "p").exists()
    else:
        found = run(loaded(tmp_path / "p", kind), case.batch)
        if method.name == "prompt":  # PEFT gives logits at the soft tokens too
            found = found[:, -wanted.shape[1] :]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "kind"), FORMS, ids=name)
def test_the_merged_model_gives_our_outputs_or_the_form_is_refused(method, kind, tmp_path):
    case, adapter = attached(method, kind)
    moved(adapter)
    try:
        adapter.export(tmp_path / "m", format="merged")
    except UserError as refusal:
        assert not method.cls.folds or "has no place" in str(refusal)
    else:
        merged = type(case.model).from_pretrained(tmp_path / "m")
        torch.testing.assert_close(run(merged, case.batch), run(case.model, case.batch), rtol=1e-5, atol=1e-5)
    assert make(kind).model.config.to_dict().keys() == case.model.config.to_dict().keys()
