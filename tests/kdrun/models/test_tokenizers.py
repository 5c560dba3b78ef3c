from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from kdrun.errors import InputError
from kdrun.models.locate import locate_model
from kdrun.models.tokenizers import compare_tokenizers, load_tokenizer


def difference(teacher: Any, student: Any) -> str:
    with pytest.raises(InputError) as info:
        compare_tokenizers(teacher, student)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_one_tokenizer(tiny_tokenizer: Any) -> None:
    match = compare_tokenizers(tiny_tokenizer, copy.deepcopy(tiny_tokenizer))
    assert match.vocab_size == len(tiny_tokenizer)
    assert not match.notes


def test_tokens_on_top_of_either_side_are_left_out(tiny_tokenizer: Any) -> None:
    size = len(tiny_tokenizer)
    more = copy.deepcopy(tiny_tokenizer)
    more.add_tokens(["<tool>", "<think>"])
    for pair in ((more, tiny_tokenizer), (tiny_tokenizer, more)):
        match = compare_tokenizers(*pair)
        assert match.vocab_size == size
        assert match.left_out == {"<tool>": size, "<think>": size + 1}
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["<other>"])  # under the id of <tool>
    match = compare_tokenizers(more, other)
    assert match.vocab_size == size
    assert set(match.left_out) == {"<tool>", "<think>", "<other>"}


def test_a_token_that_is_missing_amid_the_others_is_a_difference(tiny_tokenizer: Any) -> None:
    names = {**tiny_tokenizer.get_vocab()}
    missing = sorted(names, key=names.__getitem__)[30]
    del names[missing]
    student = copy.deepcopy(tiny_tokenizer)
    student.get_vocab = lambda: names
    message = difference(tiny_tokenizer, student)
    assert "differ in 1 token:" in message
    assert f"{missing!r} (teacher id 30, student missing)" in message


def test_tokens_on_top_of_another_way_of_cutting_texts_are_a_difference(
    tiny_tokenizer: Any,
) -> None:
    from tokenizers import normalizers

    student = copy.deepcopy(tiny_tokenizer)
    student.add_tokens(["<tool>"])
    student.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "differ in 1 token" in difference(tiny_tokenizer, student)


def test_swapped_ids_are_named_lowest_first(tiny_tokenizer: Any) -> None:
    swapped = {**tiny_tokenizer.get_vocab()}
    names = sorted(swapped, key=swapped.__getitem__)
    for a, b in ((10, 11), (20, 21)):
        swapped[names[a]], swapped[names[b]] = b, a
    student = copy.deepcopy(tiny_tokenizer)
    student.get_vocab = lambda: swapped
    message = difference(tiny_tokenizer, student)
    assert "differ in 4 tokens" in message
    assert f"{names[10]!r} (teacher id 10, student id 11)" in message
    assert message.index(repr(names[10])) < message.index(repr(names[20]))
    assert repr(names[21]) not in message


def test_gaps_in_the_ids_count(tiny_tokenizer: Any) -> None:
    # Padding cut to the number of tokens would cut off the last ones.
    gap = {**tiny_tokenizer.get_vocab(), "<last>": 1000}
    both = copy.deepcopy(tiny_tokenizer)
    both.get_vocab = lambda: gap
    assert compare_tokenizers(both, both).vocab_size == 1001


def test_other_differences_are_noted(tiny_tokenizer: Any) -> None:
    teacher = copy.deepcopy(tiny_tokenizer)
    teacher.eos_token = "<|endoftext|>"
    teacher.chat_template = "other"
    notes = compare_tokenizers(teacher, tiny_tokenizer).notes
    assert len(notes) == 2
    assert "eos_token" in notes[0]
    assert "the student's is used" in notes[1]
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    assert "plain prompt format" in compare_tokenizers(tiny_tokenizer, plain).notes[0]


def test_another_way_of_cutting_texts_is_noted(tiny_tokenizer: Any) -> None:
    from tokenizers import normalizers

    teacher = copy.deepcopy(tiny_tokenizer)
    teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
    (note,) = compare_tokenizers(teacher, tiny_tokenizer).notes
    assert "split text differently" in note


def test_saved_and_loaded(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tiny_tokenizer.chat_template
    assert not compare_tokenizers(loaded, tiny_tokenizer).notes


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    from transformers import T5Config

    # transformers would load an empty tokenizer for this type.
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="contains no tokenizer"):
        load_tokenizer(locate_model(tmp_path))


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError) as info:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(info.value)
    assert "\n" not in str(info.value)


def test_no_such_name() -> None:
    with pytest.raises(InputError, match="no model of this name"):
        load_tokenizer("no-such-owner/no-such-name")


@pytest.mark.real_model
def test_a_gguf_file_and_the_folder_made_from_it(
    smollm2_gguf: Path, smollm2_tokenizer: Any
) -> None:
    teacher = load_tokenizer(locate_model(smollm2_gguf))
    by_name = load_tokenizer(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    for tokenizer in (teacher, by_name):
        match = compare_tokenizers(tokenizer, smollm2_tokenizer)
        assert match.vocab_size == 49152
        assert not match.notes
    student = copy.deepcopy(smollm2_tokenizer)
    student.add_tokens(["<think>", "</think>"])
    match = compare_tokenizers(teacher, student)
    assert match.vocab_size == 49152
    assert match.left_out == {"<think>": 49152, "</think>": 49153}
