import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from modcompile.errors import ArtifactError, ConfigError
from modcompile.prompts import check_fits, encode_prompt
from tests.tiny_tokenizer import make_tokenizer


def test_prompt_starts_as_the_tokenizer_starts_a_text() -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    input_ids = encode_prompt(tokenizer, "one two")
    assert input_ids.dtype == torch.long
    assert input_ids.shape[0] == 1
    assert input_ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(input_ids[0, 1:]) == "one two"


def test_chat_uses_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant: {% endif %}"
    )
    input_ids = encode_prompt(tokenizer, "one two", chat=True)
    assert tokenizer.decode(input_ids[0]) == "<bos>user: one two<eos><bos>assistant: "
    assert input_ids[0, 0] == tokenizer.bos_token_id


def test_chat_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="--chat needs a chat template"):
        encode_prompt(tokenizer, "one two", chat=True)


def test_prompt_may_be_blank(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, " \n")[0]) == " \n"


@pytest.mark.parametrize("chat", [False, True])
def test_rejects_an_empty_prompt(tokenizer: PreTrainedTokenizerFast, *, chat: bool) -> None:
    with pytest.raises(ConfigError, match="--prompt is empty"):
        encode_prompt(tokenizer, "", chat=chat)


def test_rejects_a_prompt_without_a_token() -> None:
    from tokenizers.normalizers import Strip

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Strip()
    with pytest.raises(ConfigError, match="has no token"):
        encode_prompt(tokenizer, "   ")


def test_prompt_and_new_tokens_may_fill_the_model() -> None:
    config = LlamaConfig(max_position_embeddings=10, vocab_size=8)
    check_fits(torch.ones(1, 6, dtype=torch.long), 4, config)
    with pytest.raises(ConfigError, match="--prompt has 6 tokens, with --max_new_tokens 5 more than the 10 positions"):
        check_fits(torch.ones(1, 6, dtype=torch.long), 5, config)


def test_rejects_tokens_that_the_model_does_not_have() -> None:
    config = LlamaConfig(max_position_embeddings=10, vocab_size=8)
    check_fits(torch.tensor([[0, 7]]), 1, config)
    with pytest.raises(ArtifactError, match="the token 8, but the model has 8: they do not belong together"):
        check_fits(torch.tensor([[0, 8]]), 1, config)
