"""Text that a model writes by itself.

What a model is trained to keep of its own predictions is best learned from text as broad as what it was trained on.
Where there is none at hand, the model still has it: LLM-QAT (Liu et al., 2023) lets it write, from a first token drawn
at random, so that texts are of many kinds.
"""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modcompile.tracing import eval_mode


@torch.no_grad()
def write_texts(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    num_tokens: int,
    batch_size: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """`count` texts of `num_tokens` tokens each, sampled; tokens that end a text are not among them.

    The first token is any of the vocabulary that is not special, behind those that the tokenizer begins a text with.
    """
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    known = min(len(tokenizer), base.config.vocab_size)
    ordinary = torch.tensor([token for token in range(known) if token not in special])
    unwanted = torch.tensor(sorted(token for token in special if token < base.config.vocab_size), dtype=torch.long)
    start = torch.tensor(tokenizer("").input_ids, dtype=torch.long)
    texts: list[str] = []
    with eval_mode(base), tqdm(total=count * num_tokens, unit="token", delay=2, leave=False) as bar:
        while len(texts) < count:
            rows = min(batch_size, count - len(texts))
            first = ordinary[torch.randint(len(ordinary), (rows, 1), generator=generator)]
            ids = torch.cat([start.expand(rows, -1), first], 1)
            given, cache = ids.to(base.device), None
            bar.update(rows)
            while ids.shape[1] < len(start) + num_tokens:
                output = base(input_ids=given, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                logits = output.logits[:, -1].float().cpu() / temperature
                logits[:, unwanted] = -torch.inf
                logits[:, known:] = -torch.inf
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                ids, given = torch.cat([ids, drawn], 1), drawn.to(base.device)
                bar.update(rows)
            texts += [str(text) for text in tokenizer.batch_decode(ids[:, len(start) :])]
    return texts
