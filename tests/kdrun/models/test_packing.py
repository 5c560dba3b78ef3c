"""Packed rows: the same logits, losses and gradients as the examples have alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.cache.build import Recipe, build_cache
from kdrun.cache.outputs import local_outputs
from kdrun.cache.read import Cache
from kdrun.cache.teacher import CachedTeacher
from kdrun.data.collate import IGNORE_INDEX, Collator
from kdrun.data.encoding import Example
from kdrun.data.pack import pack
from kdrun.errors import InputError
from kdrun.models.heads import FrozenTeacher, find_split
from kdrun.models.packing import check_packing, packing_problem

VOCAB = 53
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "gemma2": transformers.Gemma2Config,
}


def make(kind: str = "llama", seed: int = 0, attention: str = "sdpa", **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZES, "num_key_value_heads": 2, **options}
    if kind == "gemma2":
        sizes |= {"head_dim": 8, "sliding_window": 6}
    config = CONFIGS[kind](**sizes, attn_implementation=attention)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def examples(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    # The first token is a target too, which a seam must not let through.
    return [Example(input_ids=row, labels=[*row[:1], -100, *row[2:]]) for row in rows]


LENGTHS = [9, 4, 17, 2, 11, 6, 13, 5]


def test_every_example_is_packed_once_and_no_row_is_too_long() -> None:
    lengths = torch.randint(2, 40, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    loose = examples(lengths)
    rows = pack(loose, 64)
    assert all(len(row["input_ids"]) <= 64 for row in rows)
    found = []
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:stop] == list(range(stop - start))
            assert row["labels"][start] == IGNORE_INDEX
            found.append((row["input_ids"][start:stop], row["labels"][start + 1 : stop]))
    assert sorted(found) == sorted((x["input_ids"], x["labels"][1:]) for x in loose)
    assert sum(lengths) / (64 * len(rows)) > 0.97
    assert list(rows) == list(pack(loose, 64))


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("qwen2", "sdpa"),
        ("qwen2", "eager"),
        ("gemma2", "eager"),
    ],
)
def test_packed_logits_equal_those_of_the_examples_alone(kind: str, attention: str) -> None:
    model = make(kind, attention=attention)
    assert packing_problem(model) is None
    loose = examples(LENGTHS)
    rows = pack(loose, 24)
    assert len(rows) < len(loose)
    alone = {tuple(x["input_ids"]): x for x in loose}
    batch = Collator(0)(rows)
    assert "attention_mask" not in batch
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        for number, row in enumerate(rows):
            starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
            for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
                ids = row["input_ids"][start:stop]
                assert tuple(ids) in alone
                expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[number, start:stop], expected, rtol=0, atol=1e-5)


def train(
    folder: Path, rows: Any, teacher: Any = None, loss: str = "reverse_kl_chunked"
) -> DistillTrainer:
    plain = {"compiled": False} if loss.endswith("_chunked") else {}
    trainer = DistillTrainer(
        model=make(seed=1),
        teacher=make(seed=0) if teacher is None else teacher,
        loss=kdlosses.get_loss(loss, **plain),
        args=bare_arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            learning_rate=1e-1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
        ),
        data_collator=Collator(0),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    return trainer


def weights(trainer: DistillTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("loss", ["reverse_kl", "reverse_kl_chunked"])
def test_loss_and_gradients_of_packed_rows_equal_those_of_unpacked_ones(
    tmp_path: Path, loss: str
) -> None:
    loose = examples(LENGTHS)
    packed, unpacked = (train(tmp_path, rows, loss=loss) for rows in (pack(loose, 24), loose))
    torch.testing.assert_close(weights(packed), weights(unpacked), rtol=0, atol=1e-6)
    assert packed.sums.supervised_tokens == unpacked.sums.supervised_tokens
    first, second = (trainer.state.log_history[0] for trainer in (packed, unpacked))
    for key in ("loss", "class_loss", "kd_loss"):
        assert first[key] == pytest.approx(second[key], rel=1e-6)
    ours, theirs = packed.evaluate(), unpacked.evaluate()
    for key in ("eval_loss", "eval_ce", "eval_forward_kl", "eval_tokens"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_of_the_examples_serves_their_packed_rows(
    tmp_path: Path, tiny_tokenizer: Any, kind: Any
) -> None:
    loose = examples(LENGTHS)
    live = make(seed=0)
    recipe = Recipe(kind, VOCAB, 1.0, 0, VOCAB, 24, 3)
    teacher = FrozenTeacher(live, find_split(live))
    build_cache(tmp_path / "cache", local_outputs(teacher, "tiny"), tiny_tokenizer, loose, recipe)
    cached = CachedTeacher(Cache(tmp_path / "cache"), tiny_tokenizer)
    rows = pack(loose, 24)
    assert cached.missing(rows) is None
    expected = train(tmp_path, loose)
    if kind == "hidden":
        torch.testing.assert_close(
            weights(train(tmp_path, rows, cached)), weights(expected), rtol=0, atol=1e-6
        )
        return
    features = {k: v for k, v in Collator(0)(rows).items() if k != "labels"}
    assert cached.source(**features).leading_shape == features["input_ids"].shape


def test_models_that_cannot_tell_examples_apart_are_refused() -> None:
    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(InputError, match=r"data\.packing: here \(bloom\) takes no positions"):
        check_packing(bloom, "here")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )
    assert packing_problem(gpt2) is None

    class Leaky(transformers.LlamaForCausalLM):
        """Sees earlier examples, as older attention code does."""

        def forward(self, input_ids: Any = None, position_ids: Any = None, **options: Any) -> Any:
            mask = torch.ones_like(input_ids)
            return super().forward(
                input_ids=input_ids, attention_mask=mask, position_ids=position_ids, **options
            )

    torch.manual_seed(0)
    leaky = Leaky(transformers.LlamaConfig(**SIZES))
    assert packing_problem(leaky) == "(llama) lets the examples of a row attend to each other"
    assert leaky.training


def test_a_packed_run(distil: Any, tmp_path: Path) -> None:
    said: list[str] = []
    run = distil(tmp_path / "run", said, data__packing=True, training__num_epochs=1)
    pytest.importorskip("peft")
    assert distil(tmp_path / "lora", data__packing=True, lora__rank=2)
    (note,) = [line for line in said if "packed into" in line]
    assert "rows of up to 128 tokens" in note
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    text = tmp_path / "a.txt"
    text.write_text("".join(f"the user asks {i}\n" for i in range(90)), encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.packing: the training rows are plain text"):
        distil(tmp_path / "text", data__packing=True, data__train=str(text))
