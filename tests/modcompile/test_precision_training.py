import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import default_data_collator

from modcompile.config import BudgetConfig, RouterConfig
from modcompile.errors import ConfigError
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.precision_config import PrecisionBudgetConfig, PrecisionMixing, PrecisionRouterConfig, RouterScope
from modcompile.precision_router_files import save_precision_routers
from modcompile.precision_training import PrecisionTraining
from modcompile.router_task import RouterTask
from modcompile.trainer import RouterTrainer
from modcompile.training_arguments import RouterTrainingArguments
from tests.folder_contents import contents
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide

_LENGTH = 10
_DEPTH = RouterConfig(router_hidden_size=8, router_pattern="every_other")
_BITS_BUDGET = PrecisionBudgetConfig(precision_weight=3.0, ce_weight=0.5, avg_bits_target=2.5)
_DEPTH_BUDGET = BudgetConfig(router_lambda=2.0, target_active_ratio=0.1)
_CPU = torch.device("cpu")
_ADAPTED = replace(_DEPTH, skip_adapter="low_rank", adapter_rank=4)
# Every scope, every mixing; with gates for sequences, and adapters.
_KINDS: list[tuple[RouterScope, PrecisionMixing, RouterConfig | None]] = [
    ("sequence", "soft", _ADAPTED),
    ("sequence", "straight_through", _DEPTH),
    ("token", "soft", None),
    ("token", "sampled", None),
]


def _training(
    scope: RouterScope = "sequence",
    mixing: PrecisionMixing = "straight_through",
    depth: RouterConfig | None = None,
    *,
    precisions: list[int] | None = None,
    budget: PrecisionBudgetConfig = _BITS_BUDGET,
) -> PrecisionTraining:
    options = {"router_scope": scope, "precision_mixing": mixing}
    return PrecisionTraining(precisions, options, depth, "both", budget, _DEPTH_BUDGET)


def _model(task: RouterTask) -> LayerwiseQuantizeForCausalLM:
    assert isinstance(task.model, LayerwiseQuantizeForCausalLM)
    return task.model


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the base and the routers, which the graphs share."""
    shared = ("base.", "_routers.", "_depth_routers.", "_adapters.")
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(shared)}


@pytest.fixture(scope="module", params=_KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}{'-depth' if kind[2] else ''}")
def opened(request: pytest.FixtureRequest, quantized_folder: Path) -> tuple[RouterTask, dict[str, torch.Tensor]]:
    """A task, and the state that its model starts from: its routers decide by the tokens, none of them for sure."""
    task = _training(*request.param).open(quantized_folder, _CPU)
    let_routers_decide(_model(task))
    with torch.no_grad():
        for router in _model(task).routers.values():
            router.last.weight.mul_(0.01)
    return task, _state(task.model)


@pytest.fixture
def task(opened: tuple[RouterTask, dict[str, torch.Tensor]]) -> Iterator[RouterTask]:
    task, start = opened
    yield task
    _reset(task, start)


def _reset(task: RouterTask, start: dict[str, torch.Tensor]) -> None:
    task.model.load_state_dict(start, strict=False)
    task.model.zero_grad()
    task.model.gradient_checkpointing_disable()
    task.model.eval()


def _blocks(rows: int) -> Dataset:
    """Random tokens; row i is i tokens shorter than the first."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (rows, _LENGTH))
    mask = (torch.arange(_LENGTH) < _LENGTH - torch.arange(rows).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


def _trainer(task: RouterTask, folder: Path, **arguments: Any) -> RouterTrainer:
    defaults: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    return RouterTrainer(
        task,
        args=RouterTrainingArguments(output_dir=str(folder), **(defaults | arguments)),
        train_dataset=_blocks(4),
        eval_dataset=_blocks(4),
        data_collator=default_data_collator,
    )


def _summed_ce(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Of one row without padding, `[T, V]` and `[T]`."""
    return float(-logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum())


def _loss(ce: float, average_bits: float, active_ratio: float | None) -> float:
    """What the help of modcompile.train promises."""
    loss = 0.5 * ce + 3.0 * max(average_bits - 2.5, 0) / 16
    return loss if active_ratio is None else loss + 2.0 * max(active_ratio - 0.1, 0)


def test_training_loss_is_that_of_the_formula(task: RouterTask, tmp_path: Path) -> None:
    model, trainer = task.model.train(), _trainer(task, tmp_path)
    batch: dict[str, Any] = _blocks(4).with_format("torch")[:]
    torch.manual_seed(0)  # for what is sampled
    with torch.no_grad():
        output = model(**batch)
    ce, bits, gates, tokens, predicted = 0.0, list[float](), list[float](), list[int](), 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ce += _summed_ce(output.logits[row][mask], batch["input_ids"][row][mask])
        predicted += int(mask.sum()) - 1
        for column in mask.nonzero().flatten().tolist():
            tokens.append(column)
            for layer, weights in enumerate(output.precision_weights):
                of_token = weights[row, column if weights.shape[1] > 1 else 0].tolist()
                gate = float(output.gates[layer][row, column, 0]) if layer in output.gates else 1.0
                bits.append(gate * sum(weight * each for weight, each in zip(of_token, BITS, strict=True)))
                gates += [gate] if layer in output.gates else []
    assert len(bits) == len(tokens) * NUM_LAYERS
    average_bits = sum(bits) / len(bits)
    assert 2.5 < average_bits < 16
    expected = _loss(ce / predicted, average_bits, sum(gates) / len(gates) if gates else None)
    torch.manual_seed(0)
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_of_what_each_row_chooses_alone_as_it_is_used(task: RouterTask, tmp_path: Path) -> None:
    model, ce, bits, is_run = _model(task), 0.0, list[int](), list[int]()
    rows = [[row["input_ids"][: sum(row["attention_mask"])]] for row in _blocks(4)]
    for row in rows:
        output = model.infer_forward(torch.tensor(row))
        assert output.logits is not None and output.num_bits is not None
        ce += _summed_ce(output.logits[0], torch.tensor(row[0]))
        for layer, chosen in enumerate(output.num_bits):
            bits += chosen[0].tolist()
            is_run += [each > 0 for each in chosen[0].tolist()] if layer in model.depth_routers else []
    lm_loss, average_bits = ce / sum(len(row[0]) - 1 for row in rows), sum(bits) / len(bits)
    active_ratio = sum(is_run) / len(is_run) if is_run else None
    metrics = _trainer(task, tmp_path, per_device_eval_batch_size=3).evaluate()
    assert len(set(bits)) > 1
    assert metrics["eval_lm_loss"] == pytest.approx(lm_loss, rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(lm_loss), rel=1e-3)
    assert metrics["eval_average_bits"] == pytest.approx(average_bits)
    assert metrics["eval_bits_loss"] == pytest.approx(max(average_bits - 2.5, 0) / 16)
    assert metrics.get("eval_active_ratio") == (None if active_ratio is None else pytest.approx(active_ratio))
    assert metrics["eval_loss"] == pytest.approx(_loss(lm_loss, average_bits, active_ratio), rel=1e-4)


def test_a_training_changes_every_router_and_nothing_else(
    opened: tuple[RouterTask, dict[str, torch.Tensor]], task: RouterTask, tmp_path: Path
) -> None:
    before = opened[1]
    _trainer(task, tmp_path, max_steps=2, learning_rate=0.01).train()
    changed = {name for name, tensor in _state(task.model).items() if not torch.equal(tensor, before[name])}
    routers = {".".join(name.split(".")[:2]) for name in changed}
    model = _model(task)
    assert routers == {
        f"{kind}.{layer}"
        for kind, modules in (
            ("_routers", model.routers),
            ("_depth_routers", model.depth_routers),
            ("_adapters", model.adapters),
        )
        for layer in modules
    }


def test_gradient_checkpointing_updates_the_same(
    opened: tuple[RouterTask, dict[str, torch.Tensor]], task: RouterTask, tmp_path: Path
) -> None:
    updated = []
    for enabled in (False, True):
        _reset(*opened)
        _trainer(task, tmp_path, max_steps=2, learning_rate=0.01, gradient_checkpointing=enabled).train()
        updated.append(_state(task.model))
    torch.testing.assert_close(updated[1], updated[0], rtol=0, atol=0)


def test_what_is_saved_is_read_back(
    opened: tuple[RouterTask, dict[str, torch.Tensor]], task: RouterTask, tmp_path: Path
) -> None:
    task.save(tmp_path)
    for parameter in _model(task).get_trainable_parameters():
        torch.nn.init.zeros_(parameter)
    task.load(tmp_path)
    torch.testing.assert_close(_state(task.model), opened[1], rtol=0, atol=0)


@pytest.fixture(scope="module")
def with_gates(quantized_folder: Path) -> RouterTask:
    """The task of a new model, not to be changed."""
    return _training(depth=_DEPTH, precisions=[2, 16]).open(quantized_folder, _CPU)


def test_says_what_is_trained_and_how_small_it_is(with_gates: RouterTask) -> None:
    said = with_gates.description
    assert said.startswith("LlamaForCausalLM, 2, 16 bits in 3 routed layers, 2 of them with a depth gate; trainable: ")
    assert _training(depth=_DEPTH).report(with_gates) == {
        "precisions": [2, 16],
        "budget": asdict(_BITS_BUDGET),
        "depth_budget": asdict(_DEPTH_BUDGET),
    }


def test_checkpoints_hold_the_routers_alone(with_gates: RouterTask, tmp_path: Path) -> None:
    with_gates.save(tmp_path)
    assert set(contents(tmp_path)) == {"precision_routers.safetensors", "routers.safetensors", "router_config.json"}
    model, stored = _model(with_gates), load_file(tmp_path / "precision_routers.safetensors")
    assert {name.split(".")[1] for name in stored} == {"0", "1", "2"}
    assert sum(map(torch.numel, stored.values())) == sum(
        parameter.numel() for router in model.routers.values() for parameter in router.parameters()
    )


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("precisions", [2, 4]),
        ("router_config", PrecisionRouterConfig("token")),
        ("depth_config", RouterConfig(router_hidden_size=8, router_pattern="every_other", gate="soft")),
        ("depth_config", None),
    ],
)
def test_refuses_other_routers_of_the_same_shapes(
    with_gates: RouterTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str, other: Any
) -> None:
    model = _model(with_gates)
    with monkeypatch.context() as changed:
        changed.setattr(model, attribute, other)
        with_gates.save(tmp_path)
    before = _state(model)
    with pytest.raises(ConfigError, match=r"holds other routers than are trained here: .*; give the flags of its"):
        with_gates.load(tmp_path)
    torch.testing.assert_close(_state(model), before, rtol=0, atol=0)


def test_average_bits_fall_to_their_target(quantized_folder: Path, tmp_path: Path) -> None:
    budget = PrecisionBudgetConfig(precision_weight=30.0, avg_bits_target=6.0)
    task = _training(precisions=[4, 16], budget=budget).open(quantized_folder, _CPU)
    trainer = _trainer(task, tmp_path, max_steps=25, learning_rate=0.01, lr_scheduler_type="constant")
    assert trainer.evaluate()["eval_average_bits"] == 16
    trainer.train()
    assert 4 <= trainer.evaluate()["eval_average_bits"] <= 6.5


def test_without_a_folder_of_routers_options_are_the_defaults(quantized_folder: Path) -> None:
    training = PrecisionTraining([2], {}, None, "both", _BITS_BUDGET, _DEPTH_BUDGET)
    task = training.open(quantized_folder, _CPU)
    assert _model(task).router_config == PrecisionRouterConfig()
    assert training.report(task) == {"precisions": [2], "budget": asdict(_BITS_BUDGET)}
    assert "2 bits in 3 routed layers; trainable: " in task.description


@pytest.fixture(scope="module")
def trained(quantized_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose routers choose for tokens from 4 and 16 bits; not to be changed."""
    folder = Path(shutil.copytree(quantized_folder, tmp_path_factory.mktemp("trained") / "folder"))
    task = _training("token", precisions=[4, 16]).open(folder, _CPU)
    let_routers_decide(_model(task))
    task.save(folder)
    return folder


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "precision_routers.safetensors")


def _parameters(task: RouterTask, folder: Path) -> dict[str, torch.Tensor]:
    """What the routers of a task would leave in a folder."""
    model = _model(task)
    save_precision_routers(model.routers, model.router_config, model.precisions, folder)
    return _stored(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PrecisionRouterConfig("token", "straight_through")),
        ({"precision_mixing": "sampled"}, PrecisionRouterConfig("token", "sampled")),
        ({"precision_mixing": "soft"}, PrecisionRouterConfig("token", "soft")),
        ({"router_dropout": 0.1}, PrecisionRouterConfig("token", "straight_through", 0.1)),
        ({"router_scope": "token"}, PrecisionRouterConfig("token", "straight_through")),
    ],
)
def test_trained_routers_are_trained_further_in_another_way(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    expected: PrecisionRouterConfig,
) -> None:
    """They do not start anew, from the static allocation or otherwise."""
    task = PrecisionTraining(None, options, None, "both", _BITS_BUDGET, _DEPTH_BUDGET, _blocks(2)).open(trained, _CPU)
    assert (_model(task).router_config, _model(task).precisions) == (expected, [4, 16])
    assert {module.p for module in task.model.modules() if isinstance(module, torch.nn.Dropout)} == {
        expected.router_dropout
    }
    torch.testing.assert_close(_parameters(task, tmp_path), _stored(trained), rtol=0, atol=0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("precisions", "options", "chosen"),
    [
        ([2, 4, 16], {}, "for each token from 2, 4, 16 bits"),
        ([2, 16], {"precision_mixing": "soft"}, "for each token from 2, 16 bits"),
        (None, {"router_scope": "sequence"}, "for each sequence from 4, 16 bits"),
    ],
)
@pytest.mark.parametrize("start", [_blocks(2), None], ids=["static", "most"])
def test_new_routers_start_from_the_static_allocation_and_it_is_said_that_trained_ones_are_not_used(
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    precisions: list[int] | None,
    options: dict[str, Any],
    chosen: str,
    start: Dataset | None,
) -> None:
    # The fewest bits that there are: what starts from the most does not choose them.
    budget = PrecisionBudgetConfig(avg_bits_target=4.0 if precisions is None else 2.0)
    training = PrecisionTraining(precisions, options, None, "both", budget, _DEPTH_BUDGET, start)
    model = _model(training.open(trained, _CPU))
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == (
        f"the routers in {trained} are not used: they choose for each token from 4, 16 bits; new ones choose {chosen}"
    )
    assert len(rest) == (start is not None)
    assert model.router_config == replace(PrecisionRouterConfig("token", "straight_through"), **options)
    bits = torch.stack(model.infer_forward(torch.arange(3, 12)[None]).num_bits or ())
    assert bits.unique().tolist() == [16 if start is None else model.precisions[0]]


def test_copies_what_a_folder_holds(quantized_folder: Path, tmp_path: Path) -> None:
    _training().copy(quantized_folder, tmp_path / "copy", overwrite=False)
    assert contents(tmp_path / "copy") == contents(quantized_folder)
