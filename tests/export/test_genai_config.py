import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime_genai as genai
import pytest
import torch
from transformers import BloomConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from modcompile.checkpoints import save_base
from modcompile.export.genai_config import GENAI_CONFIG, write_genai_config
from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.prompts import encode_prompt
from tests.dense_folders import DENSE_ARCHITECTURES
from tests.tiny_in_place import in_place_model
from tests.tiny_routed import tiny_base
from tests.tiny_tokenizer import make_tokenizer

PROMPTS = [[7], [5, 6, 7], [90, 3, 3, 41, 17, 60, 61, 62, 63]]
TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }}: {{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
)
TEXT = "Names refer to things: 3 cafés, ½ naïve, 日本, 🙂."


@pytest.fixture(scope="module")
def in_place_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_place")
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=128)
    write_genai_config(folder, in_place_model(), config, GenerationConfig(), tokenizer)
    ir.save(in_place_model(), folder / MODEL_FILE)
    return folder


def stored(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8")))


def stream(folder: Path, prompt: Sequence[int], max_length: int) -> Iterator[int]:
    """The tokens that genai adds to a prompt."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=max_length)
    generator = genai.Generator(model, params)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
        yield int(generator.get_next_tokens()[0])


def ours(folder: Path, prompt: Sequence[int], max_length: int) -> list[int]:
    session = RoutedSession(folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    eos = stored(folder)["model"]["eos_token_id"]
    config = GenerationConfig(max_new_tokens=max_length - len(prompt), eos_token_id=eos)
    sequence: list[int] = generate(session, torch.tensor([prompt]), config).sequence[0].tolist()
    return sequence[len(prompt) :]


def assert_same_tokens(folder: Path) -> None:
    found = set()
    for prompt in PROMPTS:
        tokens = list(stream(folder, prompt, 40))
        assert tokens == ours(folder, prompt, 40)
        found |= set(tokens)
    assert len(found) > 3


def test_tokens_of_a_routed_model_are_ours(onnx_folder: Path) -> None:
    assert_same_tokens(onnx_folder)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_tokens_of_a_dense_model_are_ours(dense_onnx_folders: dict[str, Path], architecture: str) -> None:
    assert_same_tokens(dense_onnx_folders[architecture])


def test_tokens_from_a_cache_in_place_are_ours(in_place_folder: Path) -> None:
    assert stored(in_place_folder)["search"]["past_present_share_buffer"] is True
    assert_same_tokens(in_place_folder)


def test_tokens_of_a_model_that_chooses_precisions_are_ours(precision_onnx_folder: Path) -> None:
    assert_same_tokens(precision_onnx_folder)


@pytest.mark.parametrize("as_list", [False, True])
def test_stops_at_each_end(onnx_folder: Path, tmp_path: Path, as_list: bool) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))
    endless = ours(folder, PROMPTS[1], 40)
    end = endless[6]
    assert end not in endless[:6]
    stopping = GenerationConfig(eos_token_id=[299, end] if as_list else end)
    config = tiny_base().config
    write_genai_config(folder, ir.load(folder / MODEL_FILE), config, stopping, make_tokenizer())
    assert list(stream(folder, PROMPTS[1], 40)) == endless[:7]


def test_tells_what_the_graph_says(onnx_folder: Path) -> None:
    told = stored(onnx_folder)
    model, decoder = told["model"], told["model"]["decoder"]
    assert {name: model[name] for name in ("context_length", "vocab_size")} == {
        "context_length": 128,
        "vocab_size": 300,
    }
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_size", "num_hidden_layers")
    assert [decoder[name] for name in sizes] == [32, 4, 2, 8, 3]
    assert decoder["inputs"]["position_ids"] == "position_ids"
    assert told["search"]["past_present_share_buffer"] is False


def test_names_positions_only_where_they_are_an_input(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = in_place_model()
    model.graph.inputs.pop(2)
    write_genai_config(tmp_path, model, tiny_base().config, GenerationConfig(), tokenizer)
    inputs = stored(tmp_path)["model"]["decoder"]["inputs"]
    assert list(inputs) == ["input_ids", "attention_mask", "past_key_names", "past_value_names"]


def test_samples_as_modcompile_does(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sampling = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=7)
    write_genai_config(tmp_path, in_place_model(), tiny_base().config, sampling, tokenizer)
    told = stored(tmp_path)
    del told["search"]["past_present_share_buffer"]
    assert told["search"] == {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9}
    # Without a word of it, the end is the tokenizer's, and padding is done with that.
    assert (told["model"]["eos_token_id"], told["model"]["pad_token_id"]) == (2, 2)
    assert "bos_token_id" not in told["model"]


def test_writes_nothing_that_genai_could_not_use(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_genai_config(tmp_path, in_place_model(), tiny_base().config, GenerationConfig(), None)
    write_genai_config(tmp_path, in_place_model(), BloomConfig(), GenerationConfig(), tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def chat_folder(
    onnx_folder: Path, chat_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = Path(shutil.copytree(onnx_folder, tmp_path_factory.mktemp("chat") / "onnx"))
    save_base(tiny_base(), chat_tokenizer, folder)
    return folder


def test_tokenizer_reads_and_streams_as_transformers_does(
    chat_folder: Path, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = genai.Tokenizer(genai.Model(str(chat_folder)))
    tokens = chat_tokenizer(TEXT).input_ids
    assert tokenizer.encode(TEXT).tolist() == tokens
    streamed = tokenizer.create_stream()
    pieces = [streamed.decode(token) for token in tokens]
    assert "".join(pieces) == chat_tokenizer.decode(tokens) == TEXT
    assert len(list(filter(None, pieces))) > 20


def test_a_chat_begins_with_our_tokens(chat_folder: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = genai.Tokenizer(genai.Model(str(chat_folder)))
    messages = json.dumps([{"role": "user", "content": TEXT}])
    text = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    assert text == f"<bos>user: {TEXT}<eos>\n<bos>assistant: "
    assert tokenizer.encode(text).tolist() == encode_prompt(chat_tokenizer, TEXT, chat=True)[0].tolist()
