"""A run of kdrun with random weights of the sizes of Llama 3.1 8B and Llama 3.2 1B.

    python docs/benchmarks/gpu_run.py --folder DIR [--small]

Configurations, a tokenizer of one token per word and rows of random words are made here, so that
nothing is downloaded. Prints the line of JSON of whole_run.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LARGE = (
    {"factor": 8.0},
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
)
ONE = (
    {"factor": 32.0},
    {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
)
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SPECIAL = ("<|begin_of_text|>", "<|eot_id|>", "<|unknown|>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <|eot_id|> "
    "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tokenizer(folder: Path, vocab: int) -> list[str]:
    """Save a tokenizer of one token per word; returns the words."""
    words = [f"w{number}" for number in range(vocab - len(SPECIAL) - 2)]
    known = {word: number for number, word in enumerate((*SPECIAL, "user", "assistant", *words))}
    made = Tokenizer(models.WordLevel(known, unk_token=SPECIAL[2]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[1],
        unk_token=SPECIAL[2],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return words


def save_model(folder: Path, vocab: int, factor: dict[str, float], sizes: dict[str, Any]) -> None:
    """Save random weights in bfloat16, drawn on the accelerator if there is one."""
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        max_position_embeddings=131072,
        rope_parameters=ROPE | factor,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        **sizes,
    )
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size="4GB")


def save_rows(path: Path, words: list[str], length: int) -> None:
    """Write rows of random words; half of each is the answer."""
    draws = random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for _ in range(100):
            prompt, response = (" ".join(draws.choices(words, k=length // 2)) for _ in range(2))
            stream.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def main() -> int:
    """Make the pair and its rows, and run kdrun on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    folder: Path = given.folder
    vocab, length = (512, 32) if given.small else (128256, 480)
    teacher, student = ((LARGE[0], TINY), (ONE[0], TINY)) if given.small else (LARGE, ONE)
    for name, sizes in (("teacher", teacher), ("student", student)):
        save_model(folder / name, vocab, *sizes)
        words = save_tokenizer(folder / name, vocab)
    save_rows(folder / "rows.jsonl", words, length)
    command = [sys.executable, str(Path(__file__).with_name("whole_run.py"))]
    command += ["--teacher", str(folder / "teacher"), "--student", str(folder / "student")]
    command += ["--data", str(folder / "rows.jsonl"), "--max-length", "512", "--batch-size", "4"]
    command += ["--loss", "forward_kl_chunked", "--kd-ratio", "0.5", "--max-steps", "20"]
    command += ["--set", "training.precision=bf16", "--set", "training.gradient_checkpointing=true"]
    # The student that the run saves goes here too: the system's temporary folder may be small.
    return subprocess.run(
        command, env={**os.environ, "TMPDIR": str(folder)}, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
