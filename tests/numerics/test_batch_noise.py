"""Curvature, batch and rate: the numbers of sheet 069 and a simulation of its model."""

import math

import pytest
import torch

from veneer.errors import UserError
from veneer.numerics.batch_noise import (
    critical_batch,
    effective_batch,
    fit_noise,
    inflated,
    scale_lr,
    stable_rate,
)

BATCHES = (1, 2, 4, 8, 32, 128, math.inf)


def test_the_table_of_oracle_5():
    tops = [inflated(10, 200, b) for b in BATCHES]
    assert tops == pytest.approx([28.2843, 20, 15, 12.5, 10.625, 10.1562, 10], rel=1e-5)
    sgd = [0.07071, 0.1, 0.13333, 0.16, 0.18824, 0.19692, 0.2]
    assert [stable_rate(t) for t in tops] == pytest.approx(sgd, abs=5e-6)
    adam = [0.37606, 0.44721, 0.5164, 0.56569, 0.61357, 0.62757, 0.63246]
    assert [stable_rate(t, "adam") for t in tops] == pytest.approx(adam, abs=6e-6)
    assert critical_batch(10, 200) == 2


def test_inflation_is_continuous_where_the_outlier_enters_the_bulk_and_falls_with_the_batch():
    assert inflated(3.0, 9 * 4 * (1 - 1e-9), 4) == pytest.approx(inflated(3.0, 9 * 4 * (1 + 1e-9), 4))
    tops = [inflated(2.0, 50.0, b) for b in range(1, 60)]
    assert tops == sorted(tops, reverse=True)


@pytest.mark.parametrize("spike", [3.0, 2.0, 1.5, 0.5])
def test_a_spiked_random_matrix_shows_the_inflated_eigenvalue_as_in_oracle_4(spike):
    g, n, found = torch.Generator().manual_seed(3), 600, []
    for _ in range(6):
        M = torch.randn(n, n, generator=g)
        E = (M + M.mT) / math.sqrt(2 * n)
        E[0, 0] += spike
        found.append(torch.linalg.eigvalsh(E)[-1].item())
    assert sum(found) / 6 == pytest.approx(inflated(spike, 1.0, 1.0), rel=0.02)


def test_rates_scale_as_in_oracle_7():
    assert scale_lr(0.1, 64, 256, "sgd") == pytest.approx(0.4)
    assert scale_lr(1e-3, 64, 256, "adam") == pytest.approx(2e-3)
    assert scale_lr(scale_lr(1.0, 4, 12), 12, 100) == pytest.approx(scale_lr(1.0, 4, 100))
    measured = {"rule": "measured", "curvature": 10, "noise": 200}
    assert scale_lr(1.0, 8, 32, "sgd", **measured) == pytest.approx(1.17647, abs=1e-5)
    assert scale_lr(1.0, 8, 32, "adam", **measured) == pytest.approx(1.08465, abs=1e-5)
    assert scale_lr(1.0, 8, 32, "sgd", "capped", 10, 200) == pytest.approx(1.25)
    with pytest.raises(UserError, match="curvature and the noise"):
        scale_lr(1.0, 8, 32, rule="measured")


def test_a_batch_of_all_the_data_has_no_noise():
    assert effective_batch(50, 50) == math.inf and effective_batch(20, 100) == 25
    assert stable_rate(inflated(10, 200, effective_batch(50, 50))) == pytest.approx(0.2)
    with pytest.raises(UserError, match="at most all"):
        effective_batch(51, 50)


@pytest.mark.parametrize("sizes", [(4, 8, 16, 64), (4, 8, math.inf)])
def test_the_noise_is_found_again(sizes):
    curvature, noise = fit_noise({b: inflated(10, 200, b) for b in sizes})
    assert curvature == pytest.approx(10, rel=1e-3) and noise == pytest.approx(200, rel=1e-2)
