"""BA-LoRA's terms against the numbers of its sheet (006)."""

import pytest
import torch
from torch import Tensor

import veneer
from veneer.objectives.ba_lora import BALoRA, class_terms, concentration, token_terms

P = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
Z = torch.tensor([[4.0, 3.0], [0.0, 1.0]])


def test_class_terms_are_the_sheets_oracle_3():
    consistency, diversity, svd = class_terms(Z, P, 1)
    assert consistency.item() == pytest.approx(0.52, abs=1e-6)
    assert diversity.item() == pytest.approx(16.0, abs=1e-4)
    assert svd.item() == pytest.approx(-0.863803, abs=1e-5)


def test_token_terms_are_the_sheets_oracle_4():
    consistency, diversity, _ = token_terms(Z, P, 1)
    assert consistency.item() == pytest.approx(0.462117, abs=1e-5)
    assert diversity.item() == pytest.approx(-0.582203, abs=1e-5)


def test_equal_logits_are_consistent():
    assert class_terms(P, P, 1)[0].item() == 0
    assert abs(token_terms(P, P, 1)[0].item()) < 1e-7


def test_invariances():
    z, p = torch.randn(8, 5), torch.randn(8, 5)
    scaled = z * torch.rand(8, 1).add(0.1)
    assert torch.allclose(class_terms(scaled, p, 2)[0], class_terms(z, p, 2)[0], atol=1e-6)
    assert torch.allclose(concentration(3 * z, 2), concentration(z, 2), atol=1e-5)
    assert torch.allclose(class_terms(2 * z, p, 2)[1], 16 * class_terms(z, p, 2)[1], rtol=1e-4)


def test_concentration_lies_in_its_range_and_is_minus_one_at_low_rank():
    assert -1 <= concentration(torch.randn(9, 6), 3) < 0
    low = torch.randn(9, 2, dtype=torch.double) @ torch.randn(2, 6, dtype=torch.double)
    assert concentration(low, 3).item() == pytest.approx(-1, abs=1e-4)


def test_the_gradient_of_the_concentration_is_finite_differences():
    z = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    torch.autograd.gradcheck(lambda t: concentration(t, 2), z)


def test_zero_weights_run_no_second_forward():
    hook = BALoRA(consistency=0, diversity=0, svd=0)

    def run(*args, **kwargs) -> Tensor:
        raise AssertionError("the base ran")

    assert hook.loss(None, {}, run) is None


def test_the_reference_of_a_pissa_start_is_the_untouched_base():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
    ids = torch.randint(0, 50, (2, 6))
    base = model(ids).logits
    adapter = veneer.attach(model, "ba-lora", rank=4)
    assert "pissa" in str(adapter.recipe)
    seen = []

    def run(batch, adapter="on"):
        with own.disabled():
            seen.append(model(batch["input_ids"]).logits)
        return type("Out", (), {"logits": seen[-1]})

    own = adapter
    outputs = model(ids)
    loss = own.hooks[-1].loss(outputs, {"input_ids": ids, "labels": ids}, run)
    assert torch.equal(seen[0], base)
    loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".veneer." not in n)
