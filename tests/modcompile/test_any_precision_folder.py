import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modcompile import LayerwiseQuantizeForCausalLM
from modcompile.any_precision_folder import is_any_precision_folder, read_any_precision_folder
from modcompile.checkpoints import save_base
from modcompile.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    ModcompileError,
    UnsupportedModelError,
)
from modcompile.precision_router_files import save_precision_routers
from tests.model_inputs import make_inputs
from tests.tiny_any_precision import (
    NUM_LAYERS,
    TinyAnyPrecision,
    tiny_any_precision,
    write_any_precision,
)
from tests.tiny_quantized import let_routers_decide
from tests.tiny_routed import tiny_base

_MODULE = "model.layers.1.mlp.down_proj"
_PICKLE = "pytorch_model.bin"


@pytest.fixture(scope="module")
def tiny() -> TinyAnyPrecision:
    return tiny_any_precision()


@pytest.fixture(scope="module")
def folder(tiny: TinyAnyPrecision, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("any-precision") / "folder"
    write_any_precision(tiny, path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A folder to change."""
    return Path(shutil.copytree(folder, tmp_path / "any-precision"))


@pytest.fixture(scope="module")
def layerwise(folder: Path) -> LayerwiseQuantizeForCausalLM:
    return LayerwiseQuantizeForCausalLM.from_quantized(folder)


def _plain(tiny: TinyAnyPrecision, bits: list[int]) -> LlamaForCausalLM:
    """The model of transformers in float32, each block on the weights that were packed, at bits of its own."""
    config = tiny.model.config
    assert isinstance(config, LlamaConfig)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in tiny.state.items() if "qweight" not in name and "lut" not in name}
        | {name: dense[bits[int(name.split(".")[2])]] for name, dense in tiny.dense.items()}
    )
    assert not missing and not unexpected
    return model.eval()


def test_recognises_its_folders(folder: Path, tmp_path: Path) -> None:
    save_base(tiny_base(), None, tmp_path)
    assert is_any_precision_folder(folder)
    assert not is_any_precision_folder(tmp_path)
    assert not is_any_precision_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("precisions", [None, [3], [8, 3, 4], [5, 6, 7]])
def test_reads_what_was_packed(folder: Path, tiny: TinyAnyPrecision, precisions: list[int] | None) -> None:
    read = read_any_precision_folder(folder, precisions)
    assert read.precisions == sorted(precisions or range(3, 9))
    assert read.weights.keys() == tiny.dense.keys()
    for name, dense in tiny.dense.items():
        for bits in read.precisions:
            assert torch.equal(read.weights[name].dequantize(bits), dense[bits])
    expected = _plain(tiny, [read.precisions[-1]] * NUM_LAYERS).state_dict()
    torch.testing.assert_close(read.base.state_dict(), expected, rtol=0, atol=0)
    assert not read.base.training
    assert not any(parameter.requires_grad for parameter in read.base.parameters())


def test_the_base_is_an_ordinary_model(folder: Path, tmp_path: Path) -> None:
    save_base(read_any_precision_folder(folder).base, None, tmp_path)
    assert "anyprec" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("shard_size", ["100MB", "200KB"])
def test_safetensors_go_before_a_pickle(folder: Path, tiny: TinyAnyPrecision, copied: Path, shard_size: str) -> None:
    (copied / _PICKLE).write_bytes(b"none of ours")
    save_torch_state_dict(tiny.state, copied, max_shard_size=shard_size)
    assert (copied / "model.safetensors").exists() == (shard_size == "100MB")
    read, expected = read_any_precision_folder(copied), read_any_precision_folder(folder)
    torch.testing.assert_close(read.base.state_dict(), expected.base.state_dict(), rtol=0, atol=0)


def test_folders_from_before_groups_have_one(copied: Path) -> None:
    _entry(lambda entry: entry.pop("group_count"))(copied)
    assert read_any_precision_folder(copied).precisions == list(range(3, 9))


@pytest.mark.parametrize("bits", [[3, 3], [4, 4], [5, 5], [6, 6], [7, 7], [8, 8], [4, 7]])
def test_computes_what_transformers_does_on_these_weights(
    layerwise: LayerwiseQuantizeForCausalLM, tiny: TinyAnyPrecision, bits: list[int]
) -> None:
    inputs = make_inputs(tiny.model, 3, 6, 0, "left", 0)
    layerwise.fix_precision(bits if len(set(bits)) > 1 else bits[0])
    output = layerwise.infer_forward(inputs.input_ids, inputs.attention_mask)
    with torch.no_grad():
        expected = _plain(tiny, bits)(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, position_ids=inputs.position_ids
        )
    assert output.logits is not None
    torch.testing.assert_close(output.logits[inputs.is_token], expected.logits[inputs.is_token], rtol=0, atol=1e-5)
    assert output.num_bits is not None
    assert [int(chosen.unique()) for chosen in output.num_bits] == bits


def test_training_reaches_the_routers_alone(folder: Path) -> None:
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions=[3, 4, 8])
    ids = torch.arange(12).view(2, 6)
    output = layerwise.train_forward(ids, labels=ids)
    assert output.loss is not None
    assert output.precision_weights is not None
    assert [tuple(weights.shape) for weights in output.precision_weights] == [(2, 1, 3)] * NUM_LAYERS
    output.loss.backward()
    trainable = layerwise.get_trainable_parameters()
    assert {id(parameter) for parameter in trainable} == {
        id(p) for router in layerwise.routers.values() for p in router.parameters()
    }
    gradients = [parameter.grad for parameter in trainable if parameter.grad is not None]
    assert len(gradients) == len(trainable)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in layerwise.get_frozen_parameters())


@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_keeps_trained_routers(copied: Path, scope: str) -> None:
    model = LayerwiseQuantizeForCausalLM.from_quantized(copied, [3, 5], router_scope=scope)
    let_routers_decide(model)
    save_precision_routers(model.routers, model.router_config, model.precisions, copied)
    again = LayerwiseQuantizeForCausalLM.from_quantized(copied)
    assert (again.precisions, again.router_config.router_scope) == ([3, 5], scope)
    ids = make_inputs(model.base, 2, 6, 0, "none", 0).flat[0]
    expected, actual = model.infer_forward(ids), again.infer_forward(ids)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=0)
    assert expected.num_bits is not None and actual.num_bits is not None
    assert all(map(torch.equal, actual.num_bits, expected.num_bits))


def test_exports_no_codes(layerwise: LayerwiseQuantizeForCausalLM) -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\..*weight is looked up in tables, .* quantize"):
        layerwise.export_graph()


@pytest.mark.parametrize(("precisions", "lacks"), [([16], "16"), ([2, 4], "2"), ([8, 9, 16], "9 or 16"), ([], "no")])
def test_names_the_precisions_that_there_are(folder: Path, precisions: list[int], lacks: str) -> None:
    with pytest.raises(ConfigError, match=f"has no weights of {lacks} bits; it has 3, 4, 5, 6, 7, 8$"):
        LayerwiseQuantizeForCausalLM.from_quantized(folder, precisions)


Damage = Callable[[Path], None]


def _config(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def _entry(change: Callable[[dict[str, Any]], object]) -> Damage:
    return _config(lambda config: change(config["anyprec"]))


def _tensors(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = torch.load(folder / _PICKLE, weights_only=True)
        change(tensors)
        torch.save(tensors, folder / _PICKLE)

    return damage


def _replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return _tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def _with(table: torch.Tensor, value: float) -> torch.Tensor:
    table[1, 2] = value
    return table


def _moved(tensors: dict[str, torch.Tensor]) -> None:
    """A module's tensors stand under the name of a block that the model has not."""
    for name in [name for name in tensors if name.startswith(_MODULE)]:
        tensors[name.replace("layers.1", "layers.7")] = tensors[name].clone()


def _half_a_safetensors_file(folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


class _Code:
    """What a pickle may do to whoever reads it."""

    def __reduce__(self) -> Any:
        return Path.mkdir, (Path("this_was_run"),)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (_config(lambda config: config.update(anyprec=[3, 8])), ArtifactError, "anyprec is damaged"),
        (_config(lambda config: config.update(anyprec={})), ArtifactError, "anyprec is damaged .*seed_precision"),
        (_entry(lambda entry: entry.update(parent_precision="8")), ArtifactError, "anyprec is damaged"),
        (_entry(lambda entry: entry.update(seed_precision=3.0)), ArtifactError, "anyprec is damaged"),
        (_entry(lambda entry: entry.update(seed_precision=2)), ArtifactError, "has precisions from 2 to 8"),
        (_entry(lambda entry: entry.update(parent_precision=9)), ArtifactError, "has precisions from 3 to 9"),
        (_entry(lambda entry: entry.update(seed_precision=8, parent_precision=3)), ArtifactError, "from 8 to 3"),
        (_entry(lambda entry: entry.update(group_count=2)), ArtifactError, "in 2 groups a row; only .* in one group"),
        (_config(lambda config: config.update(model_type="none")), CheckpointError, 'no model_type "none"'),
        (
            _config(lambda config: config.update(intermediate_size=1072)),
            CheckpointError,
            r"the shape of model\.layers\.0\.mlp\.down_proj\.weight does not fit its config",
        ),
        (_tensors(lambda t: t.pop(f"{_MODULE}.qweight")), ArtifactError, f"lacks {_MODULE}.qweight;"),
        (_tensors(lambda t: t.pop(f"{_MODULE}.lut5")), ArtifactError, f"lacks {_MODULE}.lut5;"),
        (
            _replaced(f"{_MODULE}.qweight", lambda planes: planes[:7].clone()),
            ArtifactError,
            rf"{_MODULE}.qweight is torch.int32 \[7, 64, 33\], not torch.int32 \[8, any, any\]",
        ),
        (
            _replaced(f"{_MODULE}.qweight", lambda planes: planes.long()),
            ArtifactError,
            rf"{_MODULE}.qweight is torch.int64 \[8, 64, 33\], not torch.int32",
        ),
        (
            _replaced(f"{_MODULE}.qweight", lambda planes: planes.flatten(1)),
            ArtifactError,
            rf"{_MODULE}.qweight is torch.int32 \[8, 2112\], not",
        ),
        (
            _replaced(f"{_MODULE}.qweight", lambda planes: planes[:, :, :-1].clone()),
            CheckpointError,
            f"the shape of {_MODULE}.weight does not fit its config",
        ),
        (
            _replaced(f"{_MODULE}.lut4", lambda table: table[:, :8].clone()),
            ArtifactError,
            rf"{_MODULE}.lut4 is torch.float16 \[64, 8\], not torch.float16 \[64, 16\]",
        ),
        (
            _replaced(f"{_MODULE}.lut4", lambda table: table[1:].clone()),
            ArtifactError,
            rf"{_MODULE}.lut4 is torch.float16 \[63, 16\], not torch.float16 \[64, 16\]",
        ),
        (_replaced(f"{_MODULE}.lut4", torch.Tensor.float), ArtifactError, f"{_MODULE}.lut4 is torch.float32"),
        (
            _replaced(f"{_MODULE}.lut3", lambda table: _with(table, torch.nan)),
            ArtifactError,
            f"{_MODULE}.lut3 holds NaN or infinity",
        ),
        (
            _replaced(f"{_MODULE}.lut8", lambda table: _with(table, -torch.inf)),
            ArtifactError,
            f"{_MODULE}.lut8 holds NaN or infinity",
        ),
        (_tensors(_moved), ArtifactError, r"has quantized model\.layers\.7\.mlp\.down_proj\.weight, which Llama"),
        (_tensors(lambda t: t.pop("model.norm.weight")), CheckpointError, r"has no weights for model\.norm\.weight"),
        (
            _tensors(lambda t: [t.pop(name) for name in list(t) if "lut" in name or "qweight" in name]),
            ArtifactError,
            "has no quantized weights",
        ),
        (_tensors(lambda t: t.update(more=_Code())), ArtifactError, r"holds more than tensors \(UnpicklingError\)"),
        (_tensors(lambda t: t.update(more=3)), ArtifactError, "holds something else than tensors"),
        (
            lambda folder: torch.save([torch.ones(1)], folder / _PICKLE),
            ArtifactError,
            "holds something else than tensors",
        ),
        (
            lambda folder: (folder / _PICKLE).write_bytes((folder / _PICKLE).read_bytes()[:-1000]),
            ArtifactError,
            f"{_PICKLE} is damaged",
        ),
        (lambda folder: (folder / _PICKLE).write_bytes(b""), ArtifactError, f"{_PICKLE} is damaged"),
        (lambda folder: (folder / _PICKLE).unlink(), CheckpointError, "has no weights; it needs model.safetensors"),
        (_half_a_safetensors_file, ArtifactError, "model.safetensors can't be read"),
    ],
)
def test_says_what_is_wrong_with_a_folder(
    copied: Path, damage: Damage, error: type[ModcompileError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.parent)
    damage(copied)
    with pytest.raises(error, match=says):
        LayerwiseQuantizeForCausalLM.from_quantized(copied)
    assert not Path("this_was_run").exists()
