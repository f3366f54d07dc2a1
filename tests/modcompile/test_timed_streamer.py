import itertools

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modcompile import timed_streamer
from modcompile.timed_streamer import TimedStreamer


def stream(streamer: TimedStreamer, tokenizer: PreTrainedTokenizerFast, prompt: str, new_text: str) -> int:
    """Put the prompt and the new text's tokens; tell how many those are."""
    streamer.put(tokenizer(prompt, return_tensors="pt").input_ids)
    tokens = [*tokenizer(new_text).input_ids, tokenizer.eos_token_id]
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    return len(tokens)


@pytest.mark.parametrize(("skip_prompt", "printed"), [(False, "It is a test.\n"), (True, " a test.\n")])
def test_prints_text_without_special_tokens(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str], *, skip_prompt: bool, printed: str
) -> None:
    streamer = TimedStreamer(tokenizer, skip_prompt=skip_prompt)
    count = stream(streamer, tokenizer, "It is", " a test.")
    assert capsys.readouterr().out == printed
    assert streamer.new_tokens == count


def test_prints_words_as_they_come(tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TimedStreamer(tokenizer)
    streamer.put(tokenizer("one two", return_tensors="pt").input_ids)
    assert capsys.readouterr().out == "one "


def test_says_after_every_put_that_it_has_it(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []
    streamer = TimedStreamer(
        tokenizer,
        on_put=lambda put: seen.append((put.prompt_tokens, put.new_tokens, capsys.readouterr().out)),
    )
    stream(streamer, tokenizer, "one two ", "x")
    length = len(tokenizer("one two ").input_ids)
    assert [counts for *counts, _ in seen] == [[length, 0], [length, 1], [length, 2]]
    assert seen[0][2] == "one two "


def test_rates(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that shows one second more at every look."""
    monkeypatch.setattr(timed_streamer, "perf_counter", map(float, itertools.count()).__next__)
    streamer = TimedStreamer(tokenizer)
    assert (streamer.new_tokens, streamer.prefill_rate, streamer.decode_rate) == (0, None, None)
    streamer.put(torch.full((1, 6), 9))
    assert (streamer.new_tokens, streamer.prefill_rate, streamer.decode_rate) == (0, None, None)
    streamer.put(torch.tensor([9]))
    assert (streamer.new_tokens, streamer.prefill_rate, streamer.decode_rate) == (1, 6.0, None)
    streamer.put(torch.tensor([9]))
    streamer.put(torch.tensor([9]))
    assert (streamer.new_tokens, streamer.prefill_rate, streamer.decode_rate) == (3, 6.0, 1.0)
