"""A cache of a real pretrained teacher on real instructions gives the live teacher's loss."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import kdlosses

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

ROWS = 24


@pytest.mark.parametrize("batch_size", [1, 5])
def test_d8_the_loss_of_every_batch_is_that_of_the_live_teacher(
    smollm2_folder: Path, shared_data: Path, tmp_path: Path, batch_size: int
) -> None:
    from kdrun.cache.build import Recipe, build_cache
    from kdrun.cache.fingerprint import print_teacher
    from kdrun.cache.outputs import local_outputs
    from kdrun.cache.read import Cache
    from kdrun.cache.teacher import CachedTeacher
    from kdrun.data.collate import Collator
    from kdrun.data.encode import encode_chats
    from kdrun.data.rows import load_rows
    from kdrun.models.heads import FrozenTeacher, find_split
    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(smollm2_folder)
    rows: Any = load_rows(shared_data / "alpaca_en_demo.json").rows[:ROWS]
    examples = encode_chats(rows, tokenizer, 96).examples
    model = load_model(locate_model(smollm2_folder))
    teacher = FrozenTeacher(model, find_split(model))
    vocab = len(tokenizer)
    recipe = Recipe("hidden", 0, 1.0, 0, vocab, 96, 4)
    build_cache(tmp_path / "c", local_outputs(teacher, "smollm2"), tokenizer, examples, recipe)
    cache = Cache(tmp_path / "c")
    cache.check_teacher(print_teacher(model), "smollm2")
    cached = CachedTeacher(cache, tokenizer)
    loss = kdlosses.get_loss("forward_kl_chunked", vocab_size=vocab, compiled=False)
    shuffled = list(examples)
    random.Random(1).shuffle(shuffled)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(vocab, 16, generator=generator)
    for first in range(0, ROWS, batch_size):
        batch = Collator(2)(shuffled[first : first + batch_size])
        features = {k: batch[k] for k in ("input_ids", "attention_mask", "shift_labels")}
        states = torch.randn(*batch["input_ids"].shape, 16, generator=generator)
        student = kdlosses.Projected(0.3 * states, head)
        live, found = (
            loss(student, side.source(**features), batch["shift_labels"])
            for side in (teacher, cached)
        )
        assert float(live) > 1
        torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-6)


def test_a_gguf_file_and_its_folder_are_one_teacher(
    smollm2_folder: Path, smollm2_gguf: Path
) -> None:
    from kdrun.cache.fingerprint import print_teacher, print_tokenizer
    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    sources = [locate_model(place) for place in (smollm2_gguf, smollm2_folder)]
    prints = [print_teacher(load_model(source)) for source in sources]
    assert prints[0] == prints[1]
    tokenizers = [print_tokenizer(load_tokenizer(source)) for source in sources]
    assert tokenizers[0] == tokenizers[1]
