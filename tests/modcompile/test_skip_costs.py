import pytest
import torch
from datasets import Dataset
from torch.nn.functional import kl_div

from modcompile.skip_costs import DenseTrace, trace_dense
from tests.tiny_models import HIDDEN_SIZE
from tests.tiny_routed import tiny_base

ROWS, LENGTH, TOKEN, LAYER = 400, 5, 1, 1
STEP = 0.05


@pytest.fixture(scope="module")
def trace() -> DenseTrace:
    """Of one row, again and again: labels are drawn anew each time."""
    ids = torch.tensor([[5, 9, 200, 17, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    columns = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    blocks = Dataset.from_dict({name: tensor.expand(ROWS, -1).tolist() for name, tensor in columns.items()})
    return trace_dense(tiny_base(), "block", blocks, batch_size=150, seed=0)


def test_holds_every_token_but_padding(trace: DenseTrace) -> None:
    assert [tuple(state.shape) for state in trace.states] == [(ROWS * 4, HIDDEN_SIZE)] * 4
    assert [tuple(gradient.shape) for gradient in trace.gradients] == [(2, ROWS * 4, HIDDEN_SIZE)] * 3
    first = trace.states[1].view(ROWS, 4, HIDDEN_SIZE)
    torch.testing.assert_close(first[0], first[-1])


@torch.no_grad()
def test_cost_is_what_predictions_of_the_row_diverge_by(trace: DenseTrace) -> None:
    base = tiny_base()
    torch.manual_seed(0)
    step = STEP * torch.randn(HIDDEN_SIZE)
    ids = torch.tensor([[5, 9, 200, 17]])

    def take_a_step(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, TOKEN] += step
        return changed

    before = base(ids).logits.double().log_softmax(-1)
    base.model.layers[LAYER].register_forward_hook(take_a_step)
    after = base(ids).logits.double().log_softmax(-1)
    diverged = float(kl_div(after, before, log_target=True, reduction="sum"))

    predicted = trace.states[LAYER + 1].view(ROWS, 4, HIDDEN_SIZE).clone()
    predicted[:, TOKEN] += step
    costs = trace.costs(LAYER, predicted.flatten(0, 1)).view(ROWS, 4)
    # 800 draws: the mean of as many squares of a normal variable spreads by 5 %.
    assert float(costs[:, TOKEN].mean()) == pytest.approx(diverged, rel=0.15)
    assert not costs[:, [0, 2, 3]].any()


def test_metric_is_the_same_for_all_tokens_together(trace: DenseTrace) -> None:
    torch.manual_seed(0)
    step = torch.randn(HIDDEN_SIZE)
    sizes = torch.rand(ROWS * 4, 1)
    costs = trace.costs(LAYER, trace.states[LAYER + 1] + sizes * step)
    assert float(0.5 * step @ trace.metric(LAYER, sizes) @ step) == pytest.approx(float(costs.mean()), rel=1e-3)
