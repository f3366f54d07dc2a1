import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.image import imread
from torch import nn

from modcompile.artifacts import read_report, save_depth_routers
from modcompile.config import BudgetConfig, RouterConfig
from modcompile.depth_training import DepthTraining
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.loss_config import LossConfig
from modcompile.objective import Budget, bits_budget, depth_budget
from modcompile.precision_config import PrecisionBudgetConfig, RouterScope
from modcompile.precision_router_files import save_precision_routers
from modcompile.precision_training import PrecisionTraining
from modcompile.routers import DepthRouter
from modcompile.training import train_routers
from modcompile.training_arguments import RouterTrainingArguments
from modcompile.training_plots import draw_history, draw_training_choices, plot_training
from tests.tiny_quantized import BITS, NUM_LAYERS, let_routers_decide, write_tiny_quantized

_DEPTH = BudgetConfig(target_active_ratio=0.4)
_BITS = PrecisionBudgetConfig(avg_bits_target=6)


@pytest.fixture(scope="module")
def blocks() -> DatasetDict:
    """Random tokens; the last two rows of the validation split are padded."""
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (12, 10))
    mask = torch.ones_like(ids)
    mask[-2:, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    columns = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    rows = Dataset.from_dict(columns)
    return DatasetDict(train=rows.select(range(6)), validation=rows.select(range(6, 12)))


def _arguments() -> RouterTrainingArguments:
    return RouterTrainingArguments(
        max_train_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.02,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
    )


def _train_precisions(folder: Path, blocks: DatasetDict, scope: RouterScope, depth: RouterConfig | None) -> None:
    write_tiny_quantized(folder, None)
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder, depth=depth, router_scope=scope)
    let_routers_decide(model)
    save_precision_routers(model.routers, model.router_config, model.precisions, folder)
    if depth is not None:
        for router in model.depth_routers.values():
            assert isinstance(router, DepthRouter)
            nn.init.normal_(router.score.down.weight, std=2.0)
            nn.init.zeros_(router.bias)
        save_depth_routers(model.depth_routers, depth, folder)
    training = PrecisionTraining(None, {}, None, "both", _BITS, _DEPTH)
    train_routers(folder, folder, blocks, training, _arguments())


@pytest.fixture(scope="module", params=["sequence", "token"])
def trained(request: pytest.FixtureRequest, blocks: DatasetDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder after a training of routers for sequences, with depth gates, or for tokens, without."""
    folder = tmp_path_factory.mktemp("trained") / "tiny"
    depth = RouterConfig(router_hidden_size=8, router_pattern="every_other")
    _train_precisions(folder, blocks, request.param, depth if request.param == "sequence" else None)
    return folder


def _points(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in axes.get_lines()}


def _stacked(axes: Axes) -> dict[str, list[float]]:
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    return {str(container.get_label()): [float(bar.get_height()) for bar in container.patches] for container in bars}


def _used(folder: Path, blocks: DatasetDict) -> list[dict[str, float]]:
    """What `infer_forward` has for each token of the validation split, one sequence a call and counted one by one."""
    model = LayerwiseQuantizeForCausalLM.from_quantized(folder)
    found: list[list[int]] = [[] for _ in range(NUM_LAYERS)]
    for row in blocks["validation"]:
        output = model.infer_forward(torch.tensor([row["input_ids"][: sum(row["attention_mask"])]]))
        assert output.num_bits is not None
        for layer, bits in enumerate(output.num_bits):
            found[layer] += bits.flatten().tolist()
    return [{str(bits): layer.count(bits) / len(layer) for bits in sorted(set(layer))} for layer in found]


def test_report_tells_what_the_trained_routers_choose(trained: Path, blocks: DatasetDict) -> None:
    training = read_report(trained)["training"]
    shares = training["shares_per_layer"]
    assert shares == [pytest.approx(expected) for expected in _used(trained, blocks)]
    assert len({bits for by_bits in shares for bits in by_bits}) > 2
    average = sum(int(bits) * share for by_bits in shares for bits, share in by_bits.items()) / NUM_LAYERS
    assert training["metrics"]["eval_average_bits"] == pytest.approx(average)
    assert math.isfinite(training["metrics"]["eval_lm_loss"])


def test_depth_gates_are_told_as_no_bits(trained: Path) -> None:
    training = read_report(trained)["training"]
    gated = [0, 2] if "depth_budget" in training else []
    assert [layer for layer, by_bits in enumerate(training["shares_per_layer"]) if "0" in by_bits] == gated


def test_history_is_that_of_the_training(trained: Path) -> None:
    training = read_report(trained)["training"]
    budgets = [bits_budget(_BITS, BITS)]
    if "depth_budget" in training:
        budgets.append(depth_budget(_DEPTH))
    panels = draw_history(training["history"], budgets).axes
    names = ["lm_loss", *(budget.name for budget in budgets)]
    assert [axes.get_ylabel() for axes in panels] == ["LM loss", "average bits", "active ratio"][: len(names)]
    for axes, name in zip(panels, names, strict=True):
        drawn = _points(axes)
        lines = [line for line in training["history"] if name in line]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert drawn["training"] == [[line["step"], line[name]] for line in lines]
        # The last is of the evaluation after the training.
        assert [step for step, _ in drawn["evaluation"]] == [2, 4, 4]
        assert drawn["evaluation"][0][1] != drawn["evaluation"][-1][1] == training["metrics"][f"eval_{name}"]
        assert ("target" in drawn) == (name != "lm_loss")
    targets = [_points(axes)["target"] for axes in panels[1:]]
    assert targets == [[[0, target], [1, target]] for target in (6, 0.4)[: len(targets)]]


def test_choices_are_those_of_the_report(trained: Path) -> None:
    shares = read_report(trained)["training"]["shares_per_layer"]
    (axes,) = draw_training_choices([{int(bits): share for bits, share in each.items()} for each in shares]).axes
    for label, heights in _stacked(axes).items():
        bits = "0" if label == "skipped" else label.removesuffix(" bits")
        assert heights == pytest.approx([by_bits.get(bits, 0.0) for by_bits in shares])


def test_both_are_written(trained: Path) -> None:
    panels = 3 if "depth_budget" in read_report(trained)["training"] else 2
    assert imread(trained / "training_history.png").shape == (300 * panels, 840, 4)
    assert imread(trained / "training_choices.png").shape == (480, 720, 4)


def test_without_precisions_there_is_a_history_alone(routed_folder: Path, blocks: DatasetDict, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(routed_folder, tmp_path / "routed"))
    train_routers(folder, folder, blocks, DepthTraining(_DEPTH, LossConfig()), _arguments())
    training = read_report(folder)["training"]
    assert "shares_per_layer" not in training
    assert [file.name for file in folder.glob("*.png")] == ["training_history.png"]
    _, ratios = draw_history(training["history"], [depth_budget(_DEPTH)]).axes
    assert ratios.get_ylabel() == "active ratio"
    assert len(_points(ratios)["training"]) == 4


def _budget(target: float) -> Budget:
    return Budget("average_bits", "bits_loss", 1.0, target, 1.0, lambda output: torch.zeros(()))


def test_what_is_learned_from_the_dense_model_has_a_panel() -> None:
    history = [{"step": 1, "lm_loss": 2.0, "distill_loss": 0.5, "active_ratio": 0.9, "loss": 2.5}]
    panels = draw_history(history, (depth_budget(BudgetConfig()),)).axes
    assert [axes.get_ylabel() for axes in panels] == ["LM loss", "KL to the dense model", "active ratio"]
    assert [_points(axes)["training"] for axes in panels] == [[[1, 2.0]], [[1, 0.5]], [[1, 0.9]]]
    assert ["target" in _points(axes) for axes in panels] == [False, False, True]


def test_leaves_out_what_is_no_number_and_targets_that_are_none(tmp_path: Path) -> None:
    history = [
        {"step": 1, "lm_loss": 2.0, "average_bits": float("nan")},
        {"step": 2, "lm_loss": float("inf"), "average_bits": 8.0},
        {"step": 2, "eval_lm_loss": 1.5, "eval_average_bits": 7.0},
        {"step": 2, "train_runtime": 3.0},
    ]
    losses, bits = draw_history(history, [_budget(0.0)]).axes
    assert _points(losses) == {"training": [[1, 2.0]], "evaluation": [[2, 1.5]]}
    assert _points(bits) == {"training": [[2, 8.0]], "evaluation": [[2, 7.0]]}
    plot_training(history, [_budget(0.0)], [], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["training_history.png"]


def test_a_training_too_short_for_a_line_of_its_own_is_drawn(tmp_path: Path) -> None:
    plot_training([{"step": 1, "eval_lm_loss": 2.0}], [], [{4: 1.0}], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"training_history.png", "training_choices.png"}
