"""Evidence equals what autograd and plain sums say of the same batches, and leaves the model as it was."""

import pytest
import torch
from models import make

from veneer.core.site import find_sites
from veneer.errors import UserError
from veneer.parts.evidence import gather


@pytest.mark.parametrize("kind", ["llama", "gpt2", "embedding", "bert"])
def test_the_gradient_is_autograds_mean_over_batches(kind):
    case = make(kind)
    sites = find_sites(case.model, case.sites)
    batches = [case.batch, {k: v.flip(0) for k, v in case.batch.items()}]
    evidence = gather(case.model, sites, batches, frozenset({"weight_gradient"}))
    for batch in batches:
        (case.model(**batch).loss / 2).backward()
    for s in sites:
        g = s.module.weight.grad
        g = g.T if s.transposed else g
        g = g if s.rows is None else g[s.rows]
        assert torch.allclose(evidence[s].gradient, g, atol=1e-5), s.path


def test_the_sketch_and_the_square_agree_with_the_gradient():
    case = make("llama")
    sites = find_sites(case.model, "linear")
    needs = frozenset({"weight_gradient", "weight_gradient_sketch", "weight_gradient_square"})
    evidence = gather(case.model, sites, [case.batch], needs, components=14)
    for s in sites:
        found = evidence[s]
        assert torch.allclose(found.gradient_square, found.gradient.square(), atol=1e-8)
        U, S, Vh = found.sketch.svd(14)
        assert torch.allclose(U @ torch.diag(S) @ Vh, found.gradient, atol=1e-4)


def test_padding_and_unlabelled_positions_do_not_count():
    case = make("llama")
    site = find_sites(case.model, "up_proj")[0]
    inputs = []
    handle = site.module.register_forward_hook(lambda m, a, y: inputs.append(a[0]))
    case.run()
    handle.remove()
    x = inputs[0][case.batch["attention_mask"].bool()]
    found = gather(case.model, [site], [case.batch], frozenset({"input_covariance"}))[site]
    assert found.tokens == len(x) == 12
    assert torch.allclose(found.covariance, x.T @ x / 12, atol=1e-5)
    batch = case.batch | {"labels": torch.full_like(case.batch["labels"], -100)}
    batch["labels"][0, :3] = 4
    found = gather(case.model, [site], [batch], frozenset({"input_covariance"}), labels_only=True)[site]
    assert found.tokens == 3


def test_siblings_share_what_is_gathered_of_one_input():
    case = make("llama")
    q, k, o = (find_sites(case.model, f"*layers.0.self_attn.{n}_proj")[0] for n in "qko")
    evidence = gather(case.model, [q, k, o], [case.batch] * 2, frozenset({"input_svd"}), components=8)
    assert evidence[q].inputs is evidence[k].inputs is not evidence[o].inputs
    assert evidence[q].tokens == evidence[k].tokens == evidence[o].tokens == 24


def test_the_model_is_as_it_was():
    case = make("bert")
    case.model.train()
    case.model.classifier.bias.requires_grad_(False)
    gather(case.model, find_sites(case.model, "query"), [case.batch], frozenset({"weight_gradient"}))
    assert case.model.training and not case.model.classifier.bias.requires_grad
    assert case.model.classifier.weight.requires_grad
    assert all(p.grad is None for p in case.model.parameters())
    assert not any(m._forward_hooks for m in case.model.modules())


@pytest.mark.parametrize("batches, says", [([], "no batch"), ([{"input_ids": torch.ones(1, 3).long()}], "no loss")])
def test_missing_batches_or_labels_are_named(batches, says):
    case = make("llama")
    with pytest.raises(UserError, match=says):
        gather(case.model, find_sites(case.model, "q_proj"), batches, frozenset({"weight_gradient"}))
