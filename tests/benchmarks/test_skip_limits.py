import torch
from datasets import Dataset

from benchmarks.skip_limits import alone, table
from modcompile.config import RouterConfig
from modcompile.routed_graph import build_routed
from modcompile.skip_costs import trace_dense
from tests.tiny_routed import tiny_base


def test_alone_counts_the_pairs_that_routers_would_skip_first() -> None:
    base = tiny_base()
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, 10)).tolist()
    blocks = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 10] * 2, "labels": ids})
    trace = trace_dense(base, "block", blocks, batch_size=2, seed=0)
    model = build_routed(base, RouterConfig(router_hidden_size=0), use_cache=False)
    # The second layer is what they all want to skip; then the last; then the first.
    for router, bias in zip(model.routers.values(), (3.0, 1.0, 2.0), strict=True):
        torch.nn.init.constant_(router.get_parameter("bias"), bias)
    costs = [float(trace.costs(layer, trace.states[layer]).sum()) / 20 for layer in range(3)]
    found = alone(model, trace, (1.0, 2 / 3, 1 / 3, 0.0))
    expected = [0.0, costs[1], costs[1] + costs[2], sum(costs)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_table_has_a_row_for_each_figure() -> None:
    nats = {"prose": {36: {"alone": [0.01, 0.02, 0.04, 0.08], "together": [0.02, 0.05, 0.3, 0.9]}}}
    assert table({"nats": nats}).splitlines()[2:] == [
        "| text | rank | | 0.95 | 0.9 | 0.8 | 0.7 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| prose | 36 | alone | 0.010 | 0.020 | 0.040 | 0.080 |",
        "| prose | 36 | together | 0.020 | 0.050 | 0.300 | 0.900 |",
    ]
