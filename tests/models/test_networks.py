"""The small networks: shapes, equations, and what comes back from a folder."""

import pytest
import torch
from torch import nn

import veneer
from veneer.errors import UserError
from veneer.models.networks import SPAN, NAFNet, load, psnr, save
from veneer.models.networks.naf import ChannelNorm
from veneer.models.networks.span import SPAB

NETWORKS = {"span": lambda: SPAN(6, 2, 2), "nafnet": lambda: NAFNet(4)}


def images(size: int = 10) -> torch.Tensor:
    """Two images."""
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_spab_is_its_equation():
    block, x = SPAB(3), torch.randn(1, 3, 5, 5)
    o1 = torch.nn.functional.silu(block.c1(x))
    o3 = block.c3(torch.nn.functional.silu(block.c2(o1)))
    y, inner = block(x)
    assert torch.allclose(y, (o3 + x) * (torch.sigmoid(o3) - 0.5)) and torch.allclose(inner, o1)


def test_the_published_span_has_its_published_size():
    count = sum(p.numel() for p in SPAN(26, 6, 4).parameters())
    assert round(count / 1000) == 131  # DSCLoRA's table: 131 k


def test_a_channel_norm_is_torchs_layer_norm_at_every_position():
    x, norm = torch.randn(2, 6, 3, 4), ChannelNorm(6)
    expected = nn.LayerNorm(6, eps=1e-6)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(norm(x), expected, atol=1e-6)


@pytest.mark.parametrize("size", [8, 10])  # 10 is not a multiple of the four that the levels need
def test_nafnet_keeps_the_size_and_starts_near_its_input(size):
    x = images(size)
    assert NAFNet(4)(x).image.shape == x.shape
    network = NAFNet(4)
    nn.init.zeros_(network.ending.weight)
    nn.init.zeros_(network.ending.bias)
    assert torch.equal(network(x).image, x)


def test_span_enlarges_and_the_loss_is_the_mean_distance():
    clean = images(20)
    loss, image = SPAN(6, 2, 2)(images(10), clean)
    assert image.shape == clean.shape
    assert torch.allclose(loss, torch.nn.functional.l1_loss(image, clean))


def test_psnr_of_a_known_error():
    clean = torch.full((2, 3, 4, 4), 0.5)
    noisy = torch.stack([clean[0] + 0.1, clean[1] - 0.01])
    assert psnr(noisy, clean) == pytest.approx((20 + 40) / 2, abs=1e-3)
    assert psnr(clean + 5, torch.ones_like(clean)) > 100  # beyond the range counts as the range's end


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_comes_back_bit_for_bit_without_its_adapters(kind, tmp_path):
    network = NETWORKS[kind]()
    x = images()
    expected = network(x).image
    adapter = veneer.attach(network, "conv-lora", sites="conv")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1)
    assert not torch.equal(network(x).image, expected)
    assert torch.equal(load(save(network, tmp_path / "net"))(x).image, expected)


def test_a_folder_that_does_not_hold_a_network_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no network\.json"):
        load(tmp_path)
    save(NETWORKS["span"](), tmp_path)
    (tmp_path / "network.json").write_text('{"network": "span", "channels": 5, "blocks": 2, "scale": 2}')
    with pytest.raises(UserError, match=r"network\.safetensors is not what"):
        load(tmp_path)
    (tmp_path / "network.json").write_text('{"network": "spam"}')
    with pytest.raises(UserError, match="does not describe"):
        load(tmp_path)
    with pytest.raises(UserError, match="Linear is not one of"):
        save(nn.Linear(2, 2), tmp_path)
