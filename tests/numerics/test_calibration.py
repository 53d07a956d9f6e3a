"""The calibration error against the numbers of sheet 088 (oracle 9) and its definition."""

import pytest
import torch

from veneer.numerics.calibration import expected_calibration_error


def test_constant_confidence_of_nine_tenths_at_accuracy_six_tenths_is_three_tenths():
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    labels = torch.tensor([0] * 6 + [1] * 4)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(0.3, abs=1e-6)


def test_perfect_calibration_is_zero():
    sure, half = torch.tensor([[1.0, 0.0]]).repeat(4, 1), torch.tensor([[0.25, 0.75]]).repeat(4, 1)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0])
    assert expected_calibration_error(torch.cat([sure, half]), labels) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("bins", [1, 5, 15])
def test_it_is_the_sum_over_bins_of_the_definition(bins):
    probabilities = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    labels = torch.arange(200) % 4
    confidence, chosen = probabilities.max(1)
    expected = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = (chosen[inside] == labels[inside]).float().mean() - confidence[inside].mean()
            expected += float(inside.float().mean() * gap.abs())
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-6)
