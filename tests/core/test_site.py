"""Sites: found by word, glob, expression or function, and seen as dense maps."""

import pytest
import torch
from models import make
from torch import nn

from veneer.core.site import all_sites, find_sites, parameter_site
from veneer.errors import UserError


def paths(model, select):
    return [s.path for s in find_sites(model, select)]


def test_linear_is_every_linear_layer_but_the_head():
    model = make("llama").model
    assert len(paths(model, "linear")) == 14
    assert "lm_head" not in paths(model, "linear")
    assert {"lm_head", "model.embed_tokens"} <= set(paths(model, "all"))


@pytest.mark.parametrize(
    "select, count",
    [("attention", 8), ("mlp", 6), ("q_proj", 2), ("*.0.*q_proj", 1), ("re:layers\\.1\\..*_proj$", 7), (["q", "v"], 4)],
)
def test_selections(select, count):
    assert len(paths(make("llama").model, select)) == count


def test_a_function_selects():
    assert len(find_sites(make("llama").model, lambda s: s.block == 1 and s.role == "down")) == 1


@pytest.mark.parametrize("select", ["q_prj", ["q_proj", "invented"], "re:^nothing", lambda s: False])
def test_a_selection_that_matches_nothing_lists_what_there_is(select):
    with pytest.raises(UserError, match=r"matches nothing.*q_proj"):
        find_sites(make("llama").model, select)


def test_a_fused_projection_is_one_site_per_role():
    sites = [s for s in find_sites(make("gpt2").model, "linear") if "c_attn" in s.path]
    assert [s.path[-3:] for s in sites[:3]] == ["[q]", "[k]", "[v]"]
    assert all(s.weight().shape == (32, 32) for s in sites)
    joined = torch.cat([s.weight() for s in sites[:3]])
    assert torch.equal(joined, sites[0].module.weight.T)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cnn", "embedding", "t5"])
def test_running_the_dense_view_is_running_the_layer(kind):
    case = make(kind)
    seen = {}
    sites = [s for s in all_sites(case.model) if s.rows is None]
    for s in sites:
        s.module.register_forward_hook(lambda m, a, y, s=s: seen.update({s: (a[0], y)}))
    case.run()
    for s, (x, y) in seen.items():
        assert torch.allclose(s.run(x, s.weight(), s.bias()), y, atol=1e-5), s.path


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cnn", "embedding"])
def test_projecting_and_lifting_equals_the_dense_product(kind):
    case = make(kind)
    seen = {}
    for s in find_sites(case.model, case.sites):
        s.module.register_forward_hook(lambda m, a, y, s=s: seen.update({s: a[0]}))
    case.run()
    for s, x in seen.items():
        A, B = torch.randn(3, s.in_features), torch.randn(s.out_features, 3)
        factored = s.lift(s.project(x, A), B)
        assert torch.allclose(factored, s.run(x, B @ A), atol=1e-3), s.path


def test_writing_goes_into_the_layers_own_storage():
    for kind in ("llama", "gpt2", "cnn", "embedding"):
        case = make(kind)
        site = find_sites(case.model, case.sites)[0]
        W = torch.randn(site.out_features, site.in_features)
        site.write(W)
        assert torch.equal(site.weight(), W)


def test_a_bias_that_a_layer_lacks_is_a_parameter_site_without_value():
    site = parameter_site(make("llama").model, "model.layers.0.mlp.up_proj.bias")
    assert site.weight() is None and site.name == "bias" and site.module_path.endswith("up_proj")


def test_the_model_itself_can_be_the_layer():
    assert [s.kind for s in find_sites(nn.Sequential(nn.Linear(3, 2)), "linear")] == ["linear"]


class SamePadded(torch.nn.Conv2d):
    """Pads in its own forward, as ports from TensorFlow do."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self._conv_forward(torch.nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_its_own_forward_runs_another_kernel_through_it(groups):
    layer = SamePadded(4, 6, 3, stride=2, groups=groups)
    (site,) = find_sites(torch.nn.Sequential(layer), "conv")
    x, W = torch.randn(2, 4, 8, 8), torch.randn(6, 36 // groups)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1))
    expected = torch.nn.functional.conv2d(padded, W.view(6, 4 // groups, 3, 3), stride=2, groups=groups)
    assert torch.equal(site.run(x, W), expected) and expected.shape == layer(x).shape
    windows = torch.nn.functional.unfold(padded, 3, stride=2).transpose(1, 2).reshape(-1, 36)
    torch.testing.assert_close(site.input_rows(x), windows)
    if groups == 1:
        torch.testing.assert_close(
            site.lift(site.project(x, W[:2]), W[:, :2]), site.run(x, W[:, :2] @ W[:2]), atol=1e-4, rtol=1e-4
        )
