import pytest
import torch

from benchmarks.peers.random_routers import randomize
from modcompile.config import RouterConfig
from modcompile.routed_graph import build_routed
from tests.tiny_models import VOCAB_SIZE, tiny_model


def test_gates_close_for_the_share_asked_for_and_for_each_token_others() -> None:
    model = build_routed(tiny_model("llama"), RouterConfig(router_hidden_size=0))
    tokens = [(index * 37) % VOCAB_SIZE for index in range(100)]
    assert randomize(model, tokens, 0.3) == pytest.approx(0.3, abs=0.005)
    with torch.no_grad():
        gates = torch.stack(model(torch.tensor([tokens])).gates).squeeze(-1).squeeze(1)
    assert gates.mean(1) == pytest.approx(0.7, abs=0.005)
    assert len({tuple(column) for column in gates.T.tolist()}) > 2
