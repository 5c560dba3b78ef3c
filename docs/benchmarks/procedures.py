"""Sampling against ``model.generate``, and an on-policy step against TRL's ``GKDTrainer``.

Both sides take turns on the same prompts and lengths; random weights of the sizes given, so that no
answer ends early unless ``--ends`` makes one token in fifty an end token. TRL is needed for the
second table only::

    python docs/benchmarks/procedures.py --what generation --layers 10
    python docs/benchmarks/procedures.py --what step --layers 4 --teacher-layers 10
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from kdrun.builtin import TEACHER_DIR
from kdrun.procedures.decode import Draw, Writer, decode
from kdrun.procedures.sampling import uniforms


def model(layers: int, vocab: int, seed: int) -> Any:
    """A Llama of SmolLM2-135M's width."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).eval()


def take_turns(rounds: int, *sides: Callable[[], Any]) -> list[float]:
    """Median seconds of each side."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds + 1):
        for side, own in zip(sides, times, strict=True):
            started = time.perf_counter()
            side()
            if number:  # the first round warms up
                own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in times]


def generation(given: argparse.Namespace) -> None:
    """One batch of answers."""
    net = model(given.layers, given.vocab, 0)
    draws = random.Random(0)
    prompts = [
        [draws.randrange(3, given.vocab) for _ in range(draws.randrange(20, 64))]
        for _ in range(given.batch)
    ]
    stops = list(range(0, given.vocab, 50)) if given.ends else [given.vocab - 1]
    width = max(map(len, prompts))
    ids = torch.zeros(given.batch, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    settings = transformers.GenerationConfig(
        max_new_tokens=given.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        eos_token_id=stops,
        pad_token_id=0,
    )

    def ours() -> None:
        decode(
            [Writer(net)],
            prompts,
            uniforms(0, 0, range(given.batch), given.new_tokens, "answer"),
            max_new_tokens=given.new_tokens,
            draw=Draw(),
            stops=set(stops),
            pad=0,
            vocab_size=given.vocab,
        )

    def theirs() -> None:
        with torch.no_grad():
            net.generate(input_ids=ids, attention_mask=mask, generation_config=settings)

    report("generation", *take_turns(given.rounds, ours, theirs))


def step(given: argparse.Namespace) -> None:
    """Loss and gradients of one batch of answers that are there already."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from kdlosses import get_loss
    from kdrun import DistillTrainer
    from kdrun.data.collate import Collator
    from kdrun.procedures.base import Origin
    from kdrun.procedures.sampling import Sample, collate

    tokenizer = transformers.AutoTokenizer.from_pretrained(TEACHER_DIR)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    draws = random.Random(0)
    half = given.length // 2
    samples = [
        Sample(
            [draws.randrange(3, given.vocab) for _ in range(half)],
            [draws.randrange(3, given.vocab) for _ in range(half)],
            Origin.STUDENT,
        )
        for _ in range(given.batch)
    ]
    batch = collate(samples, 0)
    shared: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        theirs = GKDTrainer(
            model=model(given.layers, given.vocab, 1),
            teacher_model=model(given.teacher_layers, given.vocab, 0),
            # It recomputes activations by default, which is switched off: ours does not.
            args=GKDConfig(
                output_dir=folder,
                lmbda=1.0,
                bf16=False,
                gradient_checkpointing=False,
                **shared,
            ),
            train_dataset=_conversations(),
            processing_class=tokenizer,
        )
        chosen = get_loss("generalized_jsd_chunked:beta=0.5", compiled=not given.eager)
        ours = DistillTrainer(
            model=model(given.layers, given.vocab, 1),
            teacher=model(given.teacher_layers, given.vocab, 0),
            loss=chosen,
            kd_ratio=1.0,
            args=transformers.TrainingArguments(output_dir=folder, **shared),
            procedure="gkd:lambda=1",
            processing_class=tokenizer,
            data_collator=Collator(0),
        )
    theirs.model.train()
    ours.model.train()
    count = torch.tensor(given.batch * half)
    ours._origin_tokens = torch.tensor([0, int(count), 0])
    plain = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    values = []

    def run_ours() -> None:
        loss = ours.compute_loss(ours.model, batch, num_items_in_batch=count)
        loss.backward()
        ours.model.zero_grad()
        values.append(loss.item())

    def run_theirs() -> None:
        loss = theirs.compute_loss(theirs.model, plain, num_items_in_batch=count)
        loss.backward()
        theirs.model.zero_grad()
        values.append(loss.item())

    report("step", *take_turns(given.rounds, run_ours, run_theirs))
    print(f"losses: ours {values[0]:.6f}, theirs {values[1]:.6f}")


def _conversations() -> Any:
    from datasets import Dataset

    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return Dataset.from_list([{"messages": turn}])


def report(what: str, ours: float, theirs: float) -> None:
    """One line of the table."""
    print(f"{what}: ours {ours:.3f} s, theirs {theirs:.3f} s, {theirs / ours:.2f} times faster")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=("generation", "step"), required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--teacher-layers", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ends", action="store_true")
    parser.add_argument("--eager", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.logging.set_verbosity_error()
    (generation if given.what == "generation" else step)(given)


if __name__ == "__main__":
    main()
