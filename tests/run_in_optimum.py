"""Run as a script where optimum is installed: answer requests of `test_optimum.py`, from one JSON file to another."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import GenerationConfig


def answer(model: Any, tokens: list[list[int]], mask: list[list[int]], num_new: int) -> Any:
    """The logits `[B, T, V]` of tokens `[B, T]`, or `num_new` greedy tokens for each row, `[B, num_new]`."""
    inputs = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
    if num_new == 0:
        return model(**inputs).logits.tolist()
    config = GenerationConfig(max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return model.generate(**inputs, generation_config=config)[:, len(tokens[0]) :].tolist()


def main() -> None:
    asked, answered = map(Path, sys.argv[1:])
    answers = {}
    for folder, requests in json.loads(asked.read_text(encoding="utf-8")).items():
        model = ORTModelForCausalLM.from_pretrained(folder)
        answers[folder] = [answer(model, *request) for request in requests]
    answered.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
