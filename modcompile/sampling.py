"""How the next token is chosen: the options, and what transformers makes of them."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from modcompile.config import check
from modcompile.errors import ArtifactError, ConfigError
from modcompile.progress import quiet_transformers

_GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class SamplingConfig:
    """How text is generated; greedily unless `do_sample`.

    Raises:
        ConfigError: an option is outside of its range, or has no effect without --do_sample.
    """

    max_new_tokens: int = field(
        default=50, metadata={"help": "Stop after this many tokens, if the model does not before."}
    )
    do_sample: bool = field(
        default=False, metadata={"help": "Draw each token at random, instead of taking the likeliest."}
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "With --do_sample: divide the logits by this. By default what generation_config.json says, or 1."
        },
    )
    top_k: int | None = field(
        default=None,
        metadata={
            "help": "With --do_sample: draw from this many of the likeliest tokens, 0 for all. By default what "
            "generation_config.json says, or 50."
        },
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "With --do_sample: draw from the likeliest tokens that have this probability together. By default "
            "what generation_config.json says, or 1."
        },
    )
    seed: int = field(default=42, metadata={"help": "With --do_sample: the seed of what is drawn."})

    def __post_init__(self) -> None:
        check("max_new_tokens", self.max_new_tokens, at_least=1)
        check("seed", self.seed, at_least=0, below=2**63)
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        for name, value in given.items():
            if value is not None and not self.do_sample:
                raise ConfigError(f"--{name} has no effect without --do_sample: add it, or leave --{name} out")
        if self.temperature is not None:
            check("temperature", self.temperature, above=0)
        if self.top_k is not None:
            check("top_k", self.top_k, at_least=0)
        if self.top_p is not None:
            check("top_p", self.top_p, above=0, at_most=1)

    def generation_config(self, stored: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """For transformers' `generate`: these options over what `stored` says of sampling and of special tokens.

        Nothing else is taken from `stored`, so that every runtime does the same.
        """
        eos = stored.eos_token_id if stored.eos_token_id is not None else tokenizer.eos_token_id
        first_eos = eos[0] if isinstance(eos, list) else eos
        sampling = {}
        if self.do_sample:
            for name, default in (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0)):
                value = getattr(self, name)
                stored_value = getattr(stored, name)
                sampling[name] = next(item for item in (value, stored_value, default) if item is not None)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            eos_token_id=eos,
            pad_token_id=stored.pad_token_id if stored.pad_token_id is not None else first_eos,
            bos_token_id=stored.bos_token_id,
            **sampling,
        )


def load_generation_config(folder: Path, model_config: PretrainedConfig) -> GenerationConfig:
    """What `generation_config.json` says; without one, what the model's own configuration does.

    Raises:
        ArtifactError: the file is damaged.
    """
    with quiet_transformers():
        if not (folder / _GENERATION_CONFIG).is_file():
            return GenerationConfig.from_model_config(model_config)
        try:
            return GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise ArtifactError(f"{folder / _GENERATION_CONFIG} can't be read ({error})") from error
