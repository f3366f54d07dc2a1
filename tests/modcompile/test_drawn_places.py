import pytest
import torch
from accelerate import Accelerator

from modcompile.drawn_places import draw_places


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_places_are_evenly_spaced_and_each_is_as_likely(batch_size: int) -> None:
    """In one process; several have their parts of one batch (test_several_processes)."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    drawn = torch.stack([draw_places(accelerator, batch_size) for _ in range(400)])
    assert drawn.shape == (400, batch_size)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    gaps = drawn.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / batch_size), rtol=0, atol=1e-5)
    # Mean and variance of a uniform distribution; all sequences of a batch together, so that one is 400 draws.
    assert float(drawn.mean()) == pytest.approx(1 / 2, abs=0.05)
    assert float((drawn - 1 / 2).square().mean()) == pytest.approx(1 / 12, abs=0.0125)
