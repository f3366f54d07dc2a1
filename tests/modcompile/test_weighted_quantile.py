import math

import pytest
import torch

from modcompile.weighted_quantile import weighted_quantile

VALUES = torch.tensor([3.0, 1.0, 2.0, 4.0])


@pytest.mark.parametrize(("share", "value"), [(0.0, -math.inf), (0.25, 1.5), (0.6, 2.5), (0.75, 3.5), (1.0, math.inf)])
def test_alike_it_is_between_two_of_the_values(share: float, value: float) -> None:
    assert float(weighted_quantile(VALUES, torch.ones(4), share)) == value


@pytest.mark.parametrize(("share", "value"), [(0.5, -math.inf), (0.65, 1.5), (0.7, 2.5), (0.8, 3.5)])
def test_values_count_as_they_weigh(share: float, value: float) -> None:
    assert float(weighted_quantile(VALUES, torch.tensor([1.0, 5.0, 1.5, 2.0]), share)) == pytest.approx(value)
