from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.modeling import RoutedForCausalLM
from tests.tiny_routed import ROUTED_LAYERS, tiny_routed

PROMPTS = [[7], [5, 6, 7], [200, 3, 3, 90, 41, 17], list(range(60, 100))]
THRESHOLDS = [None, 0.0, 0.3, 2.0]


@pytest.fixture
def session(onnx_folder: Path) -> RoutedSession:
    return RoutedSession(onnx_folder / MODEL_FILE, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    return tiny_routed("straight_through")


def config(**options: Any) -> GenerationConfig:
    """No EOS unless one is given: -1 is no token."""
    return GenerationConfig(
        **{"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | options
    )


def generate_torch(
    model: RoutedForCausalLM, prompt: list[int], options: GenerationConfig, threshold: float | None = None
) -> list[int]:
    model.set_router_mode(0.5 if threshold is None else threshold)
    input_ids = torch.tensor([prompt])
    sequence = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=options)
    return list(sequence[0].tolist())


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_equal_those_of_pytorch(
    model: RoutedForCausalLM, session: RoutedSession, prompt: list[int], threshold: float | None
) -> None:
    session.thresholds = threshold
    generation = generate(session, torch.tensor([prompt]), config())
    assert generation.sequence.tolist() == [generate_torch(model, prompt, config(), threshold)]
    assert generation.sequence.shape == (1, len(prompt) + 24)
    assert generation.usage is not None
    assert generation.usage.layers == ROUTED_LAYERS
    assert generation.usage.tokens == len(prompt) + 23
    assert generation.usage.active_ratio_per_layer == model.active_ratio_per_layer


def test_routers_decide_in_these_tests(model: RoutedForCausalLM) -> None:
    sequences = {tuple(generate_torch(model, PROMPTS[2], config(), threshold)) for threshold in THRESHOLDS}
    assert len(sequences) == len(THRESHOLDS)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 3.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.6},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
    ],
    ids=["plain", "temperature", "top_k", "top_p", "all"],
)
def test_drawn_tokens_equal_those_of_pytorch(
    model: RoutedForCausalLM, session: RoutedSession, options: dict[str, Any]
) -> None:
    sampling = config(do_sample=True, **options)
    expected = []
    for seed in range(3):
        torch.manual_seed(seed)
        expected.append(generate_torch(model, PROMPTS[1], sampling))
        generator = torch.Generator().manual_seed(seed)
        generation = generate(session, torch.tensor([PROMPTS[1]]), sampling, generator=generator)
        assert generation.sequence.tolist() == [expected[-1]]
    assert len(set(map(tuple, expected))) == 3


def test_draws_from_pytorchs_generator_by_default(session: RoutedSession) -> None:
    sampling, prompt = config(do_sample=True, temperature=2.0), torch.tensor([PROMPTS[1]])
    torch.manual_seed(5)
    first = generate(session, prompt, sampling).sequence
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(first, generate(session, prompt, sampling, generator=generator).sequence)
    assert not torch.equal(first, generate(session, prompt, sampling).sequence)


def test_greedy_ignores_what_is_for_sampling(session: RoutedSession) -> None:
    options = config()
    options.temperature, options.top_k, options.top_p = 5.0, 7, 0.1
    prompt = torch.tensor([PROMPTS[1]])
    assert torch.equal(generate(session, prompt, options).sequence, generate(session, prompt, config()).sequence)


@pytest.mark.parametrize("as_list", [False, True])
def test_stops_at_an_end(model: RoutedForCausalLM, session: RoutedSession, *, as_list: bool) -> None:
    prompt = PROMPTS[2]
    tokens = generate_torch(model, prompt, config())[len(prompt) :]
    end = next(token for index, token in enumerate(tokens) if index > 3 and token not in tokens[:index])
    stopping = config(eos_token_id=[299, end] if as_list else end)
    expected = prompt + tokens[: tokens.index(end) + 1]
    assert generate(session, torch.tensor([prompt]), stopping).sequence.tolist() == [expected]
    assert generate_torch(model, prompt, stopping) == expected


def test_goes_on_without_an_end(session: RoutedSession) -> None:
    options = config(max_new_tokens=5)
    options.eos_token_id = None
    assert generate(session, torch.tensor([[7]]), options).sequence.shape == (1, 6)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.received: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.received.append(value.tolist())

    def end(self) -> None:
        self.received.append("end")


def test_streams_as_transformers_does(model: RoutedForCausalLM, session: RoutedSession) -> None:
    ours, theirs = Recorder(), Recorder()
    prompt = torch.tensor([PROMPTS[1]])
    generate(session, prompt, config(max_new_tokens=4), streamer=ours)
    model.set_router_mode(0.5)
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), generation_config=config(max_new_tokens=4), streamer=theirs
    )
    assert ours.received == theirs.received
    assert len(ours.received) == 6


def test_no_usage_where_routes_are_not_told(session: RoutedSession, silent_onnx_folder: Path) -> None:
    prompt = torch.tensor([PROMPTS[1]])
    silent = generate(RoutedSession(silent_onnx_folder / MODEL_FILE), prompt, config())
    assert silent.usage is None
    assert torch.equal(silent.sequence, generate(session, prompt, config()).sequence)


@pytest.mark.parametrize("prompt", PROMPTS[1:3], ids=len)
def test_counts_bits_where_precisions_are_told(precision_onnx_folder: Path, prompt: list[int]) -> None:
    """Of tokens that PyTorch is given in the same steps: the prompt, then one at a time."""
    session = RoutedSession(precision_onnx_folder / MODEL_FILE, providers=["CPUExecutionProvider"])
    generation = generate(session, torch.tensor([prompt]), config(max_new_tokens=6))
    assert generation.usage is None
    assert generation.bits is not None
    layerwise = LayerwiseQuantizeForCausalLM.from_quantized(precision_onnx_folder.parent)
    computed = generation.sequence[:, :-1]
    steps = [computed[:, : len(prompt)], *computed[:, len(prompt) :].split(1, 1)]
    averages, cache = [], DynamicCache()
    for step in steps:
        output = layerwise.infer_forward(step, past_key_values=cache)
        assert isinstance(output.past_key_values, DynamicCache)
        cache = output.past_key_values
        assert output.num_bits is not None
        averages.append(float(torch.stack(output.num_bits).float().mean()))
    assert generation.bits.prompt.average_bits == pytest.approx(averages[0])
    assert generation.bits.new_tokens.average_bits == pytest.approx(sum(averages[1:]) / 5)
    assert all(2 <= average <= 16 for average in averages)


def test_no_bits_where_there_are_no_precisions(session: RoutedSession) -> None:
    assert generate(session, torch.tensor([PROMPTS[1]]), config(max_new_tokens=1)).bits is None
