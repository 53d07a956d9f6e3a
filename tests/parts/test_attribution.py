"""Contributions along the path between two networks against the numbers of sheet 004."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.errors import UserError
from veneer.parts.attribution import base_weights, contributions, fine_tuned, loss_at, path_gradients


class Output(NamedTuple):
    """A loss."""

    loss: Tensor


class Square(nn.Module):
    """L = ½θ²·x."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Output:
        return Output(0.5 * self.theta**2 * x)


class Net(nn.Module):
    """Two layers with a curved loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor) -> Output:
        return Output((self.b(self.drop(self.a(x).tanh())) - labels).square().mean())


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Inputs and targets."""
    g = torch.Generator().manual_seed(0)
    draw = [(torch.randn(5, 4, generator=g), torch.randn(5, 2, generator=g)) for _ in range(count)]
    return [{"x": x, "labels": y} for x, y in draw]


def net() -> Net:
    """The same network each time, in eval mode."""
    torch.manual_seed(0)
    return Net().eval()


def test_one_dimension_is_the_sheets_oracle_3():
    ends = {"theta": torch.tensor(1.0)}, {"theta": torch.tensor(3.0)}
    signed = path_gradients(Square(), *ends, {"x": torch.tensor(1.0)}, points=100)
    assert signed["theta"].item() == pytest.approx(-4.02, abs=1e-5)
    two = [{"x": torch.tensor(1.0)}, {"x": torch.tensor(-3.0)}]
    assert contributions(Square(), *ends, two, points=100)["theta"].item() == pytest.approx(2 * 4.02, abs=1e-4)


def test_the_sum_tends_to_the_difference_of_the_losses():
    model, (batch, *_) = net(), batches()
    old = base_weights(model)
    new = fine_tuned(model, batches(), steps=30, lr=0.03)
    difference = loss_at(model, old, batch) - loss_at(model, new, batch)
    errors = []
    for points in (10, 100):
        signed = path_gradients(model, old, new, batch, points)
        errors.append(abs(sum(v.sum() for v in signed.values()) - difference) / abs(difference))
    assert errors[1] < 0.02 and errors[1] < 0.2 * errors[0]


def test_the_fine_tune_is_adamw_on_a_copy():
    model, twin = net(), net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    new = fine_tuned(model, batches(), steps=5, lr=0.01)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(5):
        optimizer.zero_grad()
        twin(**batches()[step % 3]).loss.backward()
        optimizer.step()
    for name, p in twin.named_parameters():
        assert torch.allclose(new[name], p, atol=1e-6)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_adapters_on_the_model_act_but_are_not_attributed():
    model = net()
    adapter = veneer.attach(model, "lora", rank=2)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(1.0)
    old = base_weights(model)
    assert set(old) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    (batch, *_) = batches()
    assert torch.allclose(loss_at(model, old, batch), model(**batch).loss)
    fine_tuned(model, batches(), steps=2, lr=0.01)
    assert all(p.grad is None for p in adapter.parameters())


def test_bf16_weights_are_tuned_in_fp32():
    model = net().to(torch.bfloat16)
    data = [{k: v.to(torch.bfloat16) for k, v in b.items()} for b in batches()]
    new = fine_tuned(model, data, steps=2, lr=1e-5)  # too small a step for bf16 to show
    old = base_weights(model)
    assert all(v.dtype == torch.float32 for v in new.values())
    assert (new["a.weight"] != old["a.weight"].float()).any()


def test_a_loss_that_is_missing_or_not_finite_is_refused():
    with pytest.raises(UserError, match="give no loss"):
        fine_tuned(nn.Linear(2, 2), [torch.ones(1, 2)], steps=1, lr=0.1)
    with pytest.raises(UserError, match="diverged at step 1"):
        fine_tuned(Square(), [{"x": torch.tensor(float("nan"))}], steps=2, lr=0.1)
