"""DSCLoRA's loss: its terms, where they come from, and a run of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import veneer
from veneer.core.hook import Schedule
from veneer.errors import UserError
from veneer.models.networks import SPAN, save
from veneer.numerics.affinity import affinity_distance
from veneer.objectives.dsclora import DSCLoRA


def batch(count: int = 2) -> dict[str, Tensor]:
    """Small images and their enlarged ones."""
    g = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.rand(count, 3, 6, 6, generator=g),
        "labels": torch.rand(count, 3, 12, 12, generator=g),
    }


def started(recipe: str = "dsclora", teacher: torch.nn.Module | None = None):
    """A student with three blocks, its adapter and the started objective."""
    torch.manual_seed(0)
    student, teacher = SPAN(4, 3, 2), teacher or SPAN(6, 3, 2)
    adapter = veneer.attach(student, recipe)
    (hook,) = adapter.hooks
    hook.guided_by(teacher)
    hook.on_start(adapter, Schedule(1))
    return student, teacher, hook


def by_hand(network: torch.nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The image, and the nine maps of a SPAN by its equations."""
    y, found = network.stem(x - network.mean), []
    for block in network.blocks:
        o1 = F.silu(block.c1(y))
        o2 = F.silu(block.c2(o1))
        o3 = block.c3(o2)
        found += [o1, o2, o3]
        y = (o3 + y) * (torch.sigmoid(o3) - 0.5)
    return network(x).image, found


def test_the_loss_is_the_teachers_image_and_nine_affinities():
    student, teacher, hook = started("dsclora(image=0.5, affinity=2.0)")
    data = batch()
    found = hook.loss(student(**data), data, None)
    (own, mine), (shown, others) = (by_hand(n, data["pixel_values"]) for n in (student, teacher))
    image, affinity = (own - shown).abs().mean(), sum(map(affinity_distance, mine, others))
    assert len(mine) == 9
    assert torch.allclose(found, 0.5 * image + 2 * affinity, atol=1e-6)
    expected = {"image": image, "affinity": affinity, "reconstruction": (own - data["labels"]).abs().mean()}
    assert set(hook.terms) == set(expected)
    assert all(torch.allclose(hook.terms[name], value, atol=1e-6) for name, value in expected.items())


def test_only_the_factors_of_the_student_get_gradients():
    student, teacher, hook = started()
    data = batch()
    hook.loss(student(**data), data, None).backward()
    grown = {n for n, p in student.named_parameters() if p.grad is not None}
    assert grown and all(n.endswith((".A", ".B")) for n in grown)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_passes_of_other_methods_do_not_replace_the_students_maps():
    student, _, hook = started("dsclora(affinity=1.0)")
    data = batch()
    expected = hook.loss(student(**data), data, None)
    outputs = student(**data)
    with torch.no_grad():
        student(pixel_values=data["pixel_values"] * 0)
    assert torch.equal(hook.loss(outputs, data, None), expected)


def test_pooling_comes_before_the_affinities():
    student, teacher, hook = started("dsclora(image=0.0, affinity=1.0, pool=3)")
    data = batch()
    found = hook.loss(student(**data), data, None)
    pairs = zip(*(by_hand(n, data["pixel_values"])[1] for n in (student, teacher)))
    expected = sum(affinity_distance(*(F.avg_pool2d(m, 3) for m in pair)) for pair in pairs)
    assert torch.allclose(found, expected, atol=1e-6)


def test_weights_of_zero_need_no_teacher_and_run_nothing():
    def run(*args, **kwargs) -> Tensor:
        raise AssertionError("something ran")

    hook = DSCLoRA(image=0, affinity=0)
    hook.on_attach(None)
    hook.on_start(None, Schedule(1))
    assert hook.loss(None, {}, run) is None


def fitted(recipe: str, **settings):
    """Six steps of the loop on one batch."""
    torch.manual_seed(0)
    adapter = veneer.attach(SPAN(4, 3, 2), recipe)
    options = {"task": "regression", "steps": 6, "lr": 1e-2, "precision": "fp32", "display": False}
    return adapter, veneer.fit(adapter, [batch()], **(options | settings))


def test_a_run_learns_from_a_teacher_in_a_folder_and_folds_into_the_same_network(tmp_path):
    torch.manual_seed(1)
    save(SPAN(6, 3, 2), tmp_path / "teacher")
    adapter, run = fitted(f"conv-lora+dsclora(teacher='{tmp_path / 'teacher'}')", steps=40)
    assert run.losses[-1] < 0.9 * run.losses[0]
    assert not any(m._forward_hooks for n, m in adapter.model.named_modules() if n.endswith((".a1", ".c3")))
    x = batch()["pixel_values"]
    expected, shapes = adapter.model(x).image, {n: p.shape for n, p in SPAN(4, 3, 2).named_parameters()}
    baked = adapter.bake()
    assert torch.allclose(baked(x).image, expected, atol=1e-5)
    assert {n: p.shape for n, p in baked.named_parameters()} == shapes


def test_without_weight_the_run_is_bit_for_bit_that_of_conv_lora():
    (_, with_it), (_, without) = fitted("dsclora(image=0.0, affinity=0.0)"), fitted("conv-lora")
    assert with_it.losses == without.losses


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("dsclora", "larger trained network"),
        ("dsclora(teacher='nowhere')", "holds no network"),
    ],
)
def test_a_missing_teacher_is_refused_when_training_starts(recipe, message):
    with pytest.raises(UserError, match=message):
        fitted(recipe)


@pytest.mark.parametrize(
    ("fields", "teacher", "message"),
    [
        ("maps=('blocks.9.c1',)", None, "matches no module of SPAN"),
        ("", SPAN(6, 2, 2), "9 maps of the student and 6"),
    ],
)
def test_maps_that_do_not_pair_are_refused(fields, teacher, message):
    with pytest.raises(UserError, match=message):
        started(f"dsclora({fields})", teacher)


def test_maps_of_other_sizes_and_unknown_outputs_are_refused():
    student, _, hook = started("dsclora(maps=('stem',), teacher_maps=('shrink',))", Shrunk())
    data = batch()
    with pytest.raises(UserError, match=r"\(6, 6\) in the student and \(3, 3\)"):
        hook.loss(student(**data), data, None)
    with pytest.raises(UserError, match="dict has none"):
        hook.loss({}, data, None)


class Shrunk(torch.nn.Module):
    """A teacher whose map is of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.shrink = torch.nn.Conv2d(3, 12, 2, stride=2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.pixel_shuffle(self.shrink(pixel_values), 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
