from collections import Counter

import torch

from modcompile.own_text import write_texts
from tests.tiny_models import HIDDEN_SIZE
from tests.tiny_routed import tiny_base
from tests.tiny_tokenizer import make_tokenizer


def test_tokens_are_drawn_as_the_model_says() -> None:
    """The second token after each first one, beside the model's own shares."""
    base, tokenizer = tiny_base(), make_tokenizer()
    with torch.no_grad():
        base.lm_head.weight.copy_(torch.randn(300, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))
    texts = write_texts(base, tokenizer, count=6000, num_tokens=2, batch_size=1000)
    ids = [tokenizer(text).input_ids for text in texts]
    seen = Counter(pair[-1] for pair in ids if len(pair) == 2)
    firsts = Counter(pair[0] for pair in ids if len(pair) == 2)
    with torch.no_grad():
        logits = base(torch.arange(300).unsqueeze(1)).logits[:, -1]
    logits[:, :3] = -torch.inf
    shares = logits.softmax(-1)
    for token, count in seen.most_common(10):
        expected = sum(times * float(shares[first, token]) for first, times in firsts.items())
        assert abs(count - expected) < 6 * expected**0.5 + 0.1 * expected


def test_begins_as_the_tokenizer_does() -> None:
    """A model that has seen `<bos>` in front of every text sees it here; it is not part of what is written."""
    base, tokenizer = tiny_base(), make_tokenizer(adds_bos=True)
    seen: list[torch.Tensor] = []
    base.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    texts = write_texts(base, tokenizer, count=2, num_tokens=3, batch_size=2)
    assert seen[0].shape == (2, 2)
    assert seen[0][:, 0].tolist() == [1, 1]
    assert not any(text.startswith("<bos>") for text in texts)
