"""Scoring and writing through a server, beside the same without one.

    python docs/benchmarks/served.py ADDRESS MODEL ROWS [--states DIR]

ADDRESS is a server of vLLM with MODEL, started as 'kdrun served connector' prints, ROWS a JSON
Lines file of prompts and answers. Prints bytes and tokens a second of both forms, and the rate of
answers beside that of kdrun's own loop. ``vllm_offline.py`` gives vLLM's rate without a server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kdrun.config.sections import ModelConfig
from kdrun.config.served_section import ServedConfig
from kdrun.data.collate import Collator
from kdrun.data.encoder import Encoder
from kdrun.data.rows import load_rows
from kdrun.models.tokenizers import load_tokenizer
from kdrun.procedures.decode import Draw, Writer, decode
from kdrun.served.engine import Drawing
from kdrun.served.probe import open_served
from kdrun.served.writer import ServedWriter

ROWS, LENGTH, NEW = 48, 256, 64


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("address", "model", "rows"):
        parser.add_argument(name)
    parser.add_argument("--states")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    examples: Any = Encoder(tokenizer, LENGTH).chats(load_rows(given.rows).rows)
    batches = [
        Collator()([examples[n] for n in range(start, start + 8)]) for start in range(0, ROWS, 8)
    ]
    features = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    sent = sum(int(batch["attention_mask"].sum()) for batch in batches)
    tokens = sum(int((batch["shift_labels"] != -100).sum()) for batch in batches)
    print(f"{ROWS} rows, {sent} tokens, {tokens} of them supervised")
    model = ModelConfig(teacher=given.address, student=given.model)
    for form, k in (("states", 1), ("top_k", 20), ("top_k", 64), ("top_k", 128)):
        served = ServedConfig(form=form, top_k=k, folder=given.states)  # type: ignore[arg-type]
        size = len(tokenizer)
        teacher = open_served(model, served, tokenizer, size, [], LENGTH, 1.0, 1, print)

        def score(teacher: Any = teacher) -> None:
            for batch in features:
                teacher.expect(batch)
            for batch in features:
                teacher.source(**batch)

        seconds = _time(score)
        head = teacher.asked.head
        size = teacher.asked.state_bytes if head is not None else _bytes(teacher, examples[0], k)
        name = form if head is not None else f"{form} {k}"
        print(f"{name}: {sent / seconds:.0f} tokens/s, {size:.0f} bytes a supervised token")
        engine, named = teacher.asked.engine, teacher.asked.model
    own = AutoModelForCausalLM.from_pretrained(given.model, dtype="float32").eval()
    stops = {tokenizer.eos_token_id}
    writer = ServedWriter(engine, named, 64, len(tokenizer))
    drawing = Drawing(NEW, 1.0, 1.0, 0, ())
    for count in (16, 64):
        prompts = [examples[n % ROWS]["input_ids"][:32] for n in range(count)]
        uniforms = torch.rand(count, NEW, generator=torch.Generator().manual_seed(0))
        by_server = _rate(partial(writer.continuations, prompts, range(count), drawing))
        here = _rate(
            partial(
                decode,
                [Writer(own)],
                prompts,
                uniforms,
                max_new_tokens=NEW,
                draw=Draw(),
                stops=stops,
                pad=0,
                vocab_size=len(tokenizer),
            )
        )
        print(f"{count} prompts: {by_server:.0f} tokens/s by the server, {here:.0f} by decode")


def _rate(write: Callable[[], list[Any]]) -> float:
    """Return the tokens a second of a second call."""
    write()
    start = time.perf_counter()
    texts = write()
    return sum(len(text.tokens) for text in texts) / (time.perf_counter() - start)


def _time(work: Callable[[], Any]) -> float:
    """Return the seconds of a second call."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _bytes(teacher: Any, example: Any, k: int) -> float:
    """Return the bytes of JSON for a token of a row."""
    ids = list(example["input_ids"])
    body = {"model": teacher.asked.model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": k}
    answer = teacher.asked.engine.client.ask("POST", "/v1/completions", body)
    return len(json.dumps(answer)) / (len(ids) - 1)


if __name__ == "__main__":
    main()
