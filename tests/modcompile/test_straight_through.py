import torch

from modcompile.straight_through import straight_through


def test_is_hard_forward_and_soft_backward() -> None:
    soft = torch.tensor([0.1, 0.7], requires_grad=True)
    hard = straight_through(soft, torch.tensor([False, True]))
    assert hard.tolist() == [0.0, 1.0]
    assert hard.dtype == soft.dtype
    (hard * torch.tensor([2.0, 3.0])).sum().backward()
    assert soft.grad is not None
    assert soft.grad.tolist() == [2.0, 3.0]
