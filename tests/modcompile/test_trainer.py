import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import default_data_collator

from modcompile.config import BudgetConfig, BudgetLoss, GateKind, RouterConfig
from modcompile.depth_training import depth_task
from modcompile.drawn_places import draw_places
from modcompile.loss_config import GateGradient, LossConfig
from modcompile.modeling import RoutedForCausalLM
from modcompile.perplexity import evaluate_model
from modcompile.routed_graph import build_routed
from modcompile.router_task import RouterTask
from modcompile.routers import DepthRouter
from modcompile.trainer import RouterTrainer
from modcompile.training_arguments import RouterTrainingArguments
from tests.tiny_routed import tiny_base

_LENGTH = 10
_LM_LOSS = LossConfig()
_ALWAYS_OVER = BudgetConfig(router_lambda=2.0, target_active_ratio=0.0)


@pytest.fixture(scope="module", params=["soft", "straight_through"])
def built(request: pytest.FixtureRequest) -> tuple[RoutedForCausalLM, dict[int, Any]]:
    """A model for training, and the state that its routers start from."""
    model = _built(request.param)
    return model, {layer: copy.deepcopy(router.state_dict()) for layer, router in model.routers.items()}


def _built(gate: GateKind) -> RoutedForCausalLM:
    """A model of which some tokens are skipped."""
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=8, gate=gate), use_cache=False)
    torch.manual_seed(0)
    for router in model.routers.values():
        assert isinstance(router, DepthRouter)
        nn.init.normal_(router.score.down.weight, std=2.0)
        nn.init.zeros_(router.bias)
    return model


@pytest.fixture
def routed(built: tuple[RoutedForCausalLM, dict[int, Any]]) -> Iterator[RoutedForCausalLM]:
    model, start = built
    _reset(model, start)
    yield model
    model.gradient_checkpointing_disable()
    model.eval()


def _reset(model: RoutedForCausalLM, start: dict[int, Any]) -> None:
    model.zero_grad()
    for layer, router in model.routers.items():
        router.load_state_dict(start[layer])


def _routers(model: RoutedForCausalLM) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.router_parameters()])


def _blocks(rows: int, *, padded: bool = True) -> Dataset:
    """Random tokens; row i is i tokens shorter than the first."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (rows, _LENGTH))
    mask = (torch.arange(_LENGTH) < _LENGTH - torch.arange(rows).unsqueeze(1) * padded).long()
    labels = ids.masked_fill(mask == 0, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


def _batch(blocks: Dataset) -> dict[str, torch.Tensor]:
    columns: dict[str, torch.Tensor] = blocks.with_format("torch")[:]
    return columns


def _trainer(
    model: RoutedForCausalLM,
    folder: Path,
    budget: BudgetConfig,
    blocks: Dataset,
    loss: LossConfig = _LM_LOSS,
    **arguments: Any,
) -> RouterTrainer:
    defaults: dict[str, Any] = {
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    training = RouterTrainingArguments(output_dir=str(folder), **(defaults | arguments))
    return RouterTrainer(
        depth_task(model, budget, loss),
        args=training,
        train_dataset=blocks,
        eval_dataset=blocks,
        data_collator=default_data_collator,
    )


def _expected(model: RoutedForCausalLM, batch: dict[str, torch.Tensor], target: float) -> tuple[float, float, float]:
    """LM loss, active ratio and budget loss, layer by layer and row by row."""
    with torch.no_grad():
        output = model(**batch)
    gates = [
        float(gate[row, column, 0])
        for gate in output.gates
        for row, column in batch["attention_mask"].nonzero().tolist()
    ]
    active_ratio = sum(gates) / len(gates)
    return float(output.loss), active_ratio, max(active_ratio - target, 0)


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("router_lambda", [0.0, 0.01, 5.0])
def test_loss_is_that_of_the_formula(
    routed: RoutedForCausalLM, tmp_path: Path, router_lambda: float, target: float
) -> None:
    blocks = _blocks(4)
    trainer = _trainer(routed, tmp_path, BudgetConfig(router_lambda, target), blocks)
    lm_loss, active_ratio, budget_loss = _expected(routed, _batch(blocks), target)
    assert 0.1 < active_ratio < 0.95
    loss = trainer.compute_loss(routed, _batch(blocks))
    assert loss.item() == pytest.approx(lm_loss + router_lambda * budget_loss)


@pytest.mark.parametrize("weights", [(1.0, 2.0), (0.0, 0.5), (3.0, 0.0)])
def test_learns_from_the_text_and_from_the_dense_model(
    routed: RoutedForCausalLM, tmp_path: Path, weights: tuple[float, float]
) -> None:
    """The divergence is computed token by token here, of the base itself."""
    batch = _batch(_blocks(4))
    lm_loss, _, budget_loss = _expected(routed, batch, 0.3)
    with torch.no_grad():
        ours, theirs = (model(batch["input_ids"], batch["attention_mask"]).logits for model in (routed, routed.base))
    where = (batch["labels"][:, 1:] != -100).nonzero().tolist()
    divergences = [_divergence(theirs[row, column], ours[row, column]) for row, column in where]
    lm_weight, distill_weight = weights
    expected = lm_weight * lm_loss + distill_weight * sum(divergences) / len(where) + 2.0 * budget_loss
    trainer = _trainer(routed, tmp_path, BudgetConfig(2.0, 0.3), _blocks(4), LossConfig(*weights))
    assert trainer.compute_loss(routed, batch).item() == pytest.approx(expected, rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert ("eval_distill_loss" in metrics) == bool(distill_weight)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 2.0), (0.0, 1.0)])
def test_each_sequence_has_losses_for_its_price(tmp_path: Path, weights: tuple[float, float]) -> None:
    """Computed here sequence by sequence: at each price its gates, and what it loses; and what it executes, in all."""
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=0), use_cache=False)
    torch.manual_seed(0)
    for router in model.routers.values():
        nn.init.normal_(router.get_parameter("score.down.weight"), std=0.05)
    batch, price = _batch(_blocks(4)), 0.03
    predicted, tokens = int((batch["labels"][:, 1:] != -100).sum()), int(batch["attention_mask"].sum())
    budget = BudgetConfig(price, budget_loss="price", price_spread=2.0)
    trainer = _trainer(model, tmp_path, budget, _blocks(4), LossConfig(*weights))
    model.train()
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, batch)
    torch.manual_seed(5)
    place = float(torch.rand(()))
    model.eval()
    expected, executed = 0.0, 0.0
    for row in range(4):
        factor = 2 ** (2 * ((place + row / 4) % 1) - 1)
        ids = batch["input_ids"][row : row + 1, : int(batch["attention_mask"][row].sum())]
        with torch.no_grad():
            for router in model.routers.values():
                router.get_parameter("bias").sub_(math.log(factor))
            output, dense = model(ids), model.base(ids).logits[0]
            for router in model.routers.values():
                router.get_parameter("bias").add_(math.log(factor))
        executed += sum(float(gate.sum()) for gate in output.gates)
        lost = nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="sum")
        diverged = sum(_divergence(dense[column], output.logits[0, column]) for column in range(ids.shape[1] - 1))
        expected += (weights[0] * float(lost) + weights[1] * diverged) / factor
    assert 0.2 < executed / tokens / len(model.routers) < 0.8
    assert loss.item() == pytest.approx(expected / predicted + price * executed / tokens, rel=1e-4)
    metrics = trainer.evaluate()
    evaluated = weights[0] * metrics["eval_lm_loss"] + weights[1] * metrics.get("eval_distill_loss", 0.0)
    assert metrics["eval_loss"] == pytest.approx(evaluated + price * metrics["eval_budget_loss"], rel=1e-5)
    assert metrics["eval_budget_loss"] == pytest.approx(metrics["eval_active_ratio"] * len(model.routers), rel=1e-5)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_gates_learn_to_the_second_order_what_losses_of_all_weights_count(tmp_path: Path, spread: float) -> None:
    """The loss is what it is without; its gradient is that of the first order, and of the correction."""
    model = build_routed(tiny_base(), RouterConfig(router_hidden_size=0), use_cache=False)
    torch.manual_seed(0)
    for router in model.routers.values():
        nn.init.normal_(router.get_parameter("score.down.weight"), std=0.05)
    budget = BudgetConfig(0.03, budget_loss="price", price_spread=spread)
    batch, weights = _batch(_blocks(4)), (0.5, 2.0)
    trainer = _trainer(model, tmp_path, budget, _blocks(4), LossConfig(*weights, gate_gradient="second_order"))
    model.train()
    task, parameters = trainer._task, model.router_parameters()

    def loss_of(task: RouterTask) -> torch.Tensor:
        trainer._task = task
        torch.manual_seed(5)
        loss: torch.Tensor = trainer.compute_loss(model, batch)
        return loss

    corrected, plain = loss_of(task), loss_of(replace(task, gate_correction=None))
    assert corrected.item() == pytest.approx(plain.item(), rel=1e-6)

    torch.manual_seed(5)
    shares = torch.ones(4) if task.set_prices is None else 1 / task.set_prices(draw_places(trainer.accelerator, 4))
    output = model(batch["input_ids"], batch["attention_mask"])
    predicting = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    assert task.gate_correction is not None
    correction = task.gate_correction(output, predicting, shares) * sum(weights) / predicting.sum()
    found, first, second = (torch.autograd.grad(loss, parameters) for loss in (corrected, plain, correction))
    assert max(float(each.abs().max()) for each in second) > 1e-4
    torch.testing.assert_close(found, tuple(one + other for one, other in zip(first, second, strict=True)))


@pytest.mark.parametrize("kind", ["squared", "per_layer"])
def test_charges_as_the_budget_says(routed: RoutedForCausalLM, tmp_path: Path, kind: BudgetLoss) -> None:
    """In an evaluation of all rows together, however many a batch has."""
    batch = _batch(_blocks(4))
    lm_loss, active_ratio, _ = _expected(routed, batch, 0.0)
    with torch.no_grad():
        output = routed(**batch)
    tokens = batch["attention_mask"].sum()
    by_layer = [float(gate.squeeze(-1)[output.tokens].sum() / tokens) for gate in output.gates]
    target = sorted(by_layer)[1] - 0.01
    charged = {
        "squared": (active_ratio - target) ** 2,
        "per_layer": sum(max(ratio - target, 0) for ratio in by_layer) / len(by_layer),
    }[kind]
    budget = BudgetConfig(2.0, target, budget_loss=kind)
    trainer = _trainer(routed, tmp_path, budget, _blocks(4), per_device_eval_batch_size=3)
    assert trainer.compute_loss(routed, batch).item() == pytest.approx(lm_loss + 2.0 * charged, rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_budget_loss"] == pytest.approx(charged, rel=1e-4)
    assert metrics["eval_active_ratio"] == pytest.approx(active_ratio, rel=1e-5)


def test_the_target_falls_step_by_step(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    """With a learning rate of 0 the active ratio stays, and what it is charged grows."""
    active_ratio = _expected(routed, _batch(_blocks(4)), 0.0)[1]
    budget = BudgetConfig(1.0, 0.0, target_warmup_ratio=0.5)
    arguments: dict[str, Any] = {"max_steps": 4, "learning_rate": 0.0, "per_device_train_batch_size": 4}
    trainer = _trainer(routed, tmp_path, budget, _blocks(4), **arguments)
    trainer.train()
    charged = [line["budget_loss"] for line in trainer.state.log_history if "budget_loss" in line]
    expected = [max(active_ratio - target, 0) for target in (1.0, 0.5, 0.0, 0.0)]
    assert charged == pytest.approx(expected, rel=1e-4)


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum())


def test_without_lambda_no_budget_is_in_the_gradient(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    batch = _batch(_blocks(4))
    trainer = _trainer(routed, tmp_path, BudgetConfig(0.0, 0.0), _blocks(4))
    trainer.compute_loss(routed, batch).backward()
    actual = [parameter.grad for parameter in routed.router_parameters()]
    routed.zero_grad()
    routed(**batch).loss.backward()
    torch.testing.assert_close(actual, [parameter.grad for parameter in routed.router_parameters()])


def test_trains_the_routers_and_nothing_else(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    base = copy.deepcopy(routed.base.state_dict())
    routers = _routers(routed)
    _trainer(routed, tmp_path, _ALWAYS_OVER, _blocks(4), max_steps=2).train()
    assert not torch.equal(_routers(routed), routers)
    torch.testing.assert_close(routed.base.state_dict(), base, rtol=0, atol=0)


def test_routers_may_learn_at_another_rate_than_adapters(tmp_path: Path) -> None:
    """With gradient descent, an update is as much larger as the rate; a schedule is for both."""
    config = RouterConfig(router_hidden_size=0, skip_adapter="low_rank", router_init_bias=1e-3)
    model = build_routed(tiny_base(), config, use_cache=False)
    start = copy.deepcopy(model.state_dict())
    arguments: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "max_grad_norm": 0.0}
    moved: dict[float | None, list[torch.Tensor]] = {}
    for rate in (None, 0.2, 0.0):
        model.load_state_dict(start)
        trainer = _trainer(model, tmp_path, _ALWAYS_OVER, _blocks(4), router_learning_rate=rate, **arguments)
        trainer.train()
        routers, adapters = model.routers[0], model.adapters[0]
        moved[rate] = [
            routers.get_parameter("bias").detach() - 1e-3,
            adapters.get_parameter("up.weight").detach().clone(),
        ]
        assert {group["lr"] for group in _optimizer(trainer).param_groups} == {0.1, 0.1 if rate is None else rate}
        trained = [parameter for group in _optimizer(trainer).param_groups for parameter in group["params"]]
        assert {id(each) for each in trained} == {id(each) for each in model.router_parameters()}
        assert len(trained) == len(model.router_parameters())
    same, doubled, stopped = moved.values()
    assert same[0].abs() > 1e-3
    torch.testing.assert_close(doubled[0], 2 * same[0])
    assert stopped[0].abs() < 1e-9
    for other in (doubled, stopped):
        torch.testing.assert_close(other[1], same[1], rtol=0, atol=0)


def _optimizer(trainer: RouterTrainer) -> torch.optim.Optimizer:
    assert trainer.optimizer is not None
    return trainer.optimizer


@pytest.mark.parametrize("gate", get_args(GateKind))
def test_lowers_what_is_measured_hard_to_the_target(tmp_path: Path, gate: GateKind) -> None:
    """Within two percentage points."""
    model, blocks = _built(gate), _blocks(8, padded=False)
    budget = BudgetConfig(router_lambda=300, target_active_ratio=0.2, budget_loss="squared")
    arguments: dict[str, Any] = {"max_steps": 100, "learning_rate": 0.03, "lr_scheduler_type": "linear"}
    assert evaluate_model(model, blocks).hard.active_ratio > 0.4
    _trainer(model, tmp_path, budget, blocks, logging_strategy="no", **arguments).train()
    assert evaluate_model(model, blocks).hard.active_ratio == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("order", ["first_order", "second_order"])
@pytest.mark.parametrize("rows", [4, 5])
def test_accumulated_batches_update_as_one_large_batch(
    built: tuple[RoutedForCausalLM, dict[int, Any]], tmp_path: Path, rows: int, order: GateGradient
) -> None:
    """Rows differ in length; with five rows the second update has fewer batches than the first.

    Labels are drawn token by token, so that they are the same, however rows are put together.
    """
    model, start = built
    arguments = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "num_train_epochs": 1}
    updates = []
    for sizes in ((4, 1), (1, 4), (2, 2)):
        _reset(model, start)
        before = _routers(model)
        batch_size, accumulation = sizes
        trainer = _trainer(
            model,
            tmp_path,
            _ALWAYS_OVER,
            _blocks(rows),
            LossConfig(distill_weight=2.0, gate_gradient=order),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            **arguments,
        )
        torch.manual_seed(3)
        trainer.train()
        for finish in trainer._task.finish:
            finish()
        updates.append(_routers(model) - before)
    assert updates[0].abs().max() > 1e-2
    for update in updates[1:]:
        torch.testing.assert_close(update, updates[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["first_order", "second_order"])
def test_gradient_checkpointing_updates_the_same(
    built: tuple[RoutedForCausalLM, dict[int, Any]], tmp_path: Path, order: GateGradient
) -> None:
    model, start = built
    routers, loss = [], LossConfig(gate_gradient=order)
    for enabled in (False, True):
        _reset(model, start)
        trainer = _trainer(model, tmp_path, _ALWAYS_OVER, _blocks(4), loss, max_steps=2, gradient_checkpointing=enabled)
        torch.manual_seed(3)
        trainer.train()
        for finish in trainer._task.finish:
            finish()
        routers.append(_routers(model))
    model.gradient_checkpointing_disable()
    assert torch.equal(*routers)


def test_bf16_trains_routers_that_stay_in_float32(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    before = _routers(routed)
    trainer = _trainer(routed, tmp_path, _ALWAYS_OVER, _blocks(4), max_steps=2, bf16=True)
    trainer.train()
    assert {parameter.dtype for parameter in routed.parameters()} == {torch.float32}
    assert _routers(routed).isfinite().all()
    assert not torch.equal(_routers(routed), before)
    assert trainer.state.log_history[0]["lm_loss"] == pytest.approx(_expected_at(routed, before), rel=0.02)


def _expected_at(model: RoutedForCausalLM, routers: torch.Tensor) -> float:
    nn.utils.vector_to_parameters(routers, model.router_parameters())
    return _expected(model, _batch(_blocks(4)), 0.0)[0]


def test_metric_line_is_of_the_whole_update(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    """With a target between the ratios of two batches, the budget loss is the mean of what each batch was charged."""
    blocks = _blocks(4)
    rows = [_batch(blocks.select([row])) for row in range(4)]
    ratios = [_expected(routed, row, 0.0)[1] for row in rows]
    target = sum(ratios) / 4
    tokens = [int(row["attention_mask"].sum()) for row in rows]
    charged = sum(max(ratio - target, 0) * count for ratio, count in zip(ratios, tokens, strict=True)) / sum(tokens)
    lm_loss, active_ratio, _ = _expected(routed, _batch(blocks), target)
    trainer = _trainer(
        routed,
        tmp_path,
        BudgetConfig(3.0, target),
        blocks,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["lm_loss"] == pytest.approx(lm_loss, rel=1e-5)
    assert line["active_ratio"] == pytest.approx(active_ratio, rel=1e-5)
    assert line["budget_loss"] == pytest.approx(charged, rel=1e-4)
    assert line["loss"] == pytest.approx(lm_loss + 3.0 * charged, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_weighs_every_token_alike(routed: RoutedForCausalLM, tmp_path: Path, batch_size: int) -> None:
    blocks = _blocks(4)
    budget = BudgetConfig(2.0, 0.3)
    metrics = _trainer(routed, tmp_path, budget, blocks, per_device_eval_batch_size=batch_size).evaluate()
    lm_loss, active_ratio, budget_loss = _expected(routed, _batch(blocks), 0.3)
    assert metrics["eval_lm_loss"] == pytest.approx(lm_loss, rel=1e-5)
    assert metrics["eval_active_ratio"] == pytest.approx(active_ratio, rel=1e-5)
    assert metrics["eval_budget_loss"] == pytest.approx(budget_loss, rel=1e-4)
    assert metrics["eval_loss"] == pytest.approx(lm_loss + 2.0 * budget_loss, rel=1e-5)
    soft = evaluate_model(routed, blocks).soft
    assert metrics["eval_perplexity"] == pytest.approx(soft.perplexity, rel=1e-5)
    assert metrics["eval_active_ratio"] == pytest.approx(soft.active_ratio, rel=1e-5)


def test_checkpoints_hold_the_routers_and_no_base(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    trainer = _trainer(routed, tmp_path, _ALWAYS_OVER, _blocks(4), max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert {file.name for file in checkpoint.iterdir()} == {
        "optimizer.pt",
        "rng_state.pth",
        "router_config.json",
        "routers.safetensors",
        "scheduler.pt",
        "trainer_state.json",
    }
    stored = load_file(checkpoint / "routers.safetensors")
    assert all(name.startswith("routers.") for name in stored)
    assert sum(tensor.numel() for tensor in stored.values()) == _routers(routed).numel()
    size_of_routers = 4 * _routers(routed).numel()
    # Routers, two moments of each parameter, and some kilobytes of states and headers.
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3 * size_of_routers + 60_000


def test_loads_the_best_routers_at_the_end(routed: RoutedForCausalLM, tmp_path: Path) -> None:
    trainer = _trainer(
        routed,
        tmp_path,
        BudgetConfig(30, 0.0),
        _blocks(4),
        max_steps=6,
        learning_rate=0.01,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=3,
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="active_ratio",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "routers.safetensors") for step in (3, 6))
    trained = {
        f"routers.{layer}.{name}": tensor
        for layer, router in routed.routers.items()
        for name, tensor in router.state_dict().items()
    }
    torch.testing.assert_close(trained, best, rtol=0, atol=0)
    assert any(not torch.equal(best[name], last[name]) for name in best)
