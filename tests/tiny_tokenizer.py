"""A tokenizer made offline in a moment."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modcompile.corpus import builtin_documents


def make_tokenizer(*, vocab_size: int = 300, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on a little English, with `<bos>`, `<eos>` and `<pad>`: lossless on any text.

    The first three ids are `<pad>`, `<bos>` and `<eos>`. With `adds_bos` every encoded text starts with `<bos>`, as
    LLaMA's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(builtin_documents("validation"), trainer)
    if adds_bos:
        bos = ("<bos>", tokenizer.token_to_id("<bos>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=128
    )
