"""Rebuilds the built-in tokenizer, teacher and student configuration.

    python -m kdrun.models.build_builtin --output DIR [--steps N] [--seed S]

DIR receives the folders `teacher` and `student`. The default takes about twenty minutes on
one thread of a desktop processor. The teacher is trained on the training topics and on docstrings
of the standard library; neither the tokenizer nor the teacher sees the held-out topics.
"""

import argparse
import json
import math
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdrun.builtin.text import BuiltinText, load_text, standard_library_docstrings, text_hash
from kdrun.data.windows import TextWindows, concatenate

VOCAB_SIZE: Final = 2048
WINDOW: Final = 128
BATCH_SIZE: Final = 8
STEPS: Final = 6000
END_OF_TEXT: Final = "<|endoftext|>"

# `generation` marks the assistant's words, so that only they are supervised. A line break ends the
# role because no token crosses it: the prompt alone has the same tokens as in the whole dialogue.
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training text: every string can be encoded, no token is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def teacher_config() -> LlamaConfig:
    """1.05 million parameters: small enough to ship, and to run at every step of the student."""
    return _llama(hidden_size=128, intermediate_size=344, layers=4, heads=4)


def student_config() -> LlamaConfig:
    """0.42 million parameters."""
    return _llama(hidden_size=96, intermediate_size=256, layers=2, heads=3)


def held_out_cross_entropy(
    model: Any, tokens: Sequence[int], length: int = WINDOW, batch_size: int = 16
) -> float:
    """Return the mean cross-entropy, in nats per token, over non-overlapping windows."""
    windows = TextWindows(tokens, length, phase=False)
    total, count = 0.0, 0
    with torch.inference_mode():
        for first in range(0, len(windows), batch_size):
            batch = range(first, min(first + batch_size, len(windows)))
            ids = torch.tensor([windows[index]["input_ids"] for index in batch])
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            total += losses.item()
            count += ids[:, 1:].numel()
    return total / count


def train_teacher(windows: TextWindows, steps: int, seed: int) -> LlamaForCausalLM:
    """Train with `transformers.Trainer`: one warm-up, one cosine down to zero."""
    transformers.set_seed(seed)
    model = LlamaForCausalLM(teacher_config())
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 10),
            adam_beta1=0.9,
            adam_beta2=0.95,
            weight_decay=0.1,
            max_grad_norm=1.0,
            seed=seed,
            use_cpu=True,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=windows,
            data_collator=transformers.default_data_collator,
            callbacks=[_Progress()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    # The trainer disables the cache in the configuration, which would slow down generation.
    model.config.use_cache = True
    return model.eval()


def build(output: Path, steps: int = STEPS, seed: int = 0) -> dict[str, object]:
    """Write `output/teacher` and `output/student`; return the record saved with them."""
    text = load_text()
    docstrings = standard_library_docstrings(text.held_out)
    tokenizer = train_tokenizer(text.train)
    # Each topic once: a teacher that saw them three times an epoch had the same held-out
    # cross-entropy, but had memorised the student's training text and taught much less.
    tokens = concatenate([*text.train, *docstrings], tokenizer)
    model = train_teacher(TextWindows(tokens, WINDOW, seed=seed), steps, seed)

    # Measured after rounding, as the teacher is used: stored in bfloat16, loaded as float32.
    rounded = model.to(torch.bfloat16).to(torch.float32)
    held_out = concatenate(text.held_out, tokenizer)
    record = _record(text, docstrings, steps, seed, held_out_cross_entropy(rounded, held_out))
    teacher = output / "teacher"
    rounded.to(torch.bfloat16).save_pretrained(teacher)
    tokenizer.save_pretrained(teacher)
    student_config().save_pretrained(output / "student")
    (teacher / "BUILD.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kdrun.models.build_builtin", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads for torch")
    options = parser.parse_args(arguments)
    transformers.logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    record = build(options.output, options.steps, options.seed)
    print(f"held-out cross-entropy {record['held_out_ce']:.3f}; written to {options.output}")


class _Progress(transformers.TrainerCallback):
    """Print one line per log step."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']}", flush=True)


def _llama(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        # Narrow layers learn faster with larger initial weights than the usual 0.02.
        initializer_range=0.06,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _record(
    text: BuiltinText, docstrings: tuple[str, ...], steps: int, seed: int, cross_entropy: float
) -> dict[str, object]:
    if not math.isfinite(cross_entropy):
        raise RuntimeError(f"The training diverged: held-out cross-entropy {cross_entropy}.")
    return {
        "command": (
            f"python -m kdrun.models.build_builtin --output DIR --steps {steps} --seed {seed}"
        ),
        "seed": seed,
        "steps": steps,
        "text_sha256": text.sha256,
        "docstrings_sha256": text_hash(docstrings),
        "held_out_ce": round(cross_entropy, 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


if __name__ == "__main__":
    main()
