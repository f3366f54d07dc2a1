from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modcompile.errors import ConfigError
from modcompile.export.generation import generate
from modcompile.export.session import MODEL_FILE, RoutedSession
from modcompile.export.told_counts import ToldCounts
from modcompile.layerwise import LayerwiseQuantizeForCausalLM
from modcompile.modeling import RoutedForCausalLM
from tests.export.tiny_in_place import write_in_place_model
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


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and their mask, `[B, T]`; what stands in the padding is a token like others."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), 9), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    return ids, mask


@pytest.fixture(params=["growing", "in place", "in place, all logits"])
def any_session(request: pytest.FixtureRequest, onnx_folder: Path, tmp_path: Path) -> RoutedSession:
    """Of a cache that grows, or is written in place; and with or without a choice of the logits that are computed."""
    model_file = onnx_folder / MODEL_FILE
    if request.param != "growing":
        model_file = write_in_place_model(tmp_path / MODEL_FILE, keeps_logits=request.param == "in place")
    return RoutedSession(model_file, providers=["CPUExecutionProvider"])


PADDING = 1
BATCH = [[7], [5, 6, 7, 12], [20, 3, 3, 49, 41, 17, 8]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_get_the_tokens_that_they_get_alone(any_session: RoutedSession, side: str) -> None:
    ids, mask = padded(BATCH, side)
    together = generate(any_session, ids, config(max_new_tokens=9), attention_mask=mask)
    assert torch.equal(together.sequence[:, : ids.shape[1]], ids)
    active = tokens = 0.0
    for row, prompt in zip(together.sequence, BATCH, strict=True):
        alone = generate(any_session, torch.tensor([prompt]), config(max_new_tokens=9))
        assert row[ids.shape[1] :].tolist() == alone.sequence[0, len(prompt) :].tolist()
        assert alone.usage is not None
        active += alone.usage.active_ratio * alone.usage.tokens
        tokens += alone.usage.tokens
    assert together.usage is not None
    assert together.usage.tokens == tokens == sum(map(len, BATCH)) + 3 * 8
    assert together.usage.active_ratio == pytest.approx(active / tokens)


def length_until(ends: list[int], row: list[int]) -> int:
    """How many tokens of a row there are with the first end, or all."""
    return next((index + 1 for index, token in enumerate(row) if token in ends), len(row))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("as_list", [False, True])
def test_each_row_stops_at_its_own_end(any_session: RoutedSession, side: str, *, as_list: bool) -> None:
    """Then follows padding, which is no token of the counts; the batch ends with its last row."""
    alone = [generate(any_session, torch.tensor([row]), config(max_new_tokens=12)).sequence[0] for row in BATCH]
    new = [sequence[len(row) :].tolist() for sequence, row in zip(alone, BATCH, strict=True)]
    ends = [new[0][2], new[1][6]] if as_list else [new[0][4]]
    lengths = [length_until(ends, row) for row in new]
    assert len(set(lengths)) > 1
    ids, mask = padded(BATCH, side)
    stopping = config(max_new_tokens=12, eos_token_id=ends if as_list else ends[0], pad_token_id=PADDING)
    together = generate(any_session, ids, stopping, attention_mask=mask)
    expected = [(row[:length] + [PADDING] * 12)[: max(lengths)] for row, length in zip(new, lengths, strict=True)]
    assert together.sequence[:, ids.shape[1] :].tolist() == expected
    assert together.usage is not None
    assert together.usage.tokens == sum(map(len, BATCH)) + sum(lengths) - 3


def test_without_a_padding_token_the_first_end_pads(session: RoutedSession) -> None:
    ids, mask = padded(BATCH, "left")
    first = generate(session, ids, config(max_new_tokens=1), attention_mask=mask).sequence[:, -1].tolist()
    assert len(set(first)) > 1
    options = config(max_new_tokens=3, eos_token_id=[299, first[0]])
    options.pad_token_id = None
    assert generate(session, ids, options, attention_mask=mask).sequence[0, -2:].tolist() == [299, 299]


def test_streams_the_tokens_of_every_step(session: RoutedSession) -> None:
    recorder = Recorder()
    ids, mask = padded(BATCH, "right")
    sequence = generate(session, ids, config(max_new_tokens=3), attention_mask=mask, streamer=recorder).sequence
    assert recorder.received == [ids.tolist(), *sequence[:, -3:].T.tolist(), "end"]


def test_a_batch_is_drawn_by_the_generator(any_session: RoutedSession) -> None:
    ids, mask = padded(BATCH, "left")
    sampling = config(do_sample=True, temperature=2.0, top_k=0, max_new_tokens=8)
    drawn = [
        generate(any_session, ids, sampling, attention_mask=mask, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0].sequence, drawn[1].sequence)
    assert not torch.equal(drawn[0].sequence, drawn[2].sequence)


def test_counts_can_be_read_at_every_token(session: RoutedSession) -> None:
    counts = ToldCounts(session)
    seen = []

    class Reader(Recorder):
        def put(self, value: torch.Tensor) -> None:
            assert counts.usage is not None
            seen.append(counts.usage.tokens)

    prompt = torch.tensor([PROMPTS[1]])
    generation = generate(session, prompt, config(max_new_tokens=4), streamer=Reader(), counts=counts)
    assert seen == [0, 3, 4, 5, 6]
    assert generation.usage is counts.usage


def test_tells_its_time(session: RoutedSession) -> None:
    start = perf_counter()
    generation = generate(session, torch.tensor([PROMPTS[3]]), config(max_new_tokens=3))
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds > 0
    assert generation.prefill_seconds + generation.decode_seconds < perf_counter() - start


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1]], r"the attention mask is \[1, 3\], but the prompts are \[2, 3\]"),
        ([[1, 1], [1, 1]], r"the attention mask is \[2, 2\], but the prompts are \[2, 3\]"),
        ([[0, 1, 1], [0, 0, 0]], "the attention mask leaves no token of prompt 1"),
    ],
)
def test_rejects_a_mask(session: RoutedSession, mask: list[list[int]], message: str) -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError, match=message):
        generate(session, torch.ones(2, 3).long(), config(), attention_mask=torch.tensor(mask), streamer=recorder)
    assert recorder.received == []
