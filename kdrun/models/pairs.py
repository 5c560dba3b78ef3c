"""Teacher and student: tokenizers compared first, then weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.builtin import STUDENT_DIR, TEACHER_DIR
from kdrun.config.sections import BUILT_IN, ModelConfig
from kdrun.errors import InputError
from kdrun.models.context import check_length, load_model_config
from kdrun.models.load import load_model
from kdrun.models.locate import ModelSource, locate_model
from kdrun.models.merge import adapter_rows
from kdrun.models.quantize import quantize
from kdrun.models.tokenizers import compare_tokenizers, load_tokenizer, tokens_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdrun.models.heads import FrozenTeacher


_SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """What is known of a pair before its weights are loaded.

    Attributes:
        tokenizer: the student's, which encodes for both.
        vocab_size: tokens that both models share; heads are cut to it.
        left_out: tokens, with their ids, that not both models have; rows with them are skipped.
        teacher: where the teacher is, or None.
        student: where the student is.
        fresh_student: whether the student is a configuration without weights.
        notes: harmless differences, one line each.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    teacher: ModelSource | None
    student: ModelSource
    fresh_student: bool
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def locate_pair(config: ModelConfig) -> tuple[ModelSource | None, ModelSource]:
    """Where teacher and student are; nothing is loaded.

    Raises:
        InputError: a model is not there.
    """
    teacher = None if config.teacher is None else _locate(config.teacher, TEACHER_DIR)
    return teacher, _locate(config.student, STUDENT_DIR)


def find_pair(config: ModelConfig) -> Pair:
    """Locate both models and compare their tokenizers; no weights are loaded.

    Raises:
        InputError: a model is not there, or the tokenizers differ.
    """
    trust = config.trust_remote_code
    fresh = config.student == BUILT_IN
    teacher, student = locate_pair(config)
    student_tokenizer = load_tokenizer(
        _locate(BUILT_IN, TEACHER_DIR) if fresh else student, trust_remote_code=trust
    )
    teacher_tokenizer = (
        student_tokenizer if teacher is None else load_tokenizer(teacher, trust_remote_code=trust)
    )
    match = compare_tokenizers(teacher_tokenizer, student_tokenizer)
    size = min(match.vocab_size, *(_head_rows(source, trust) for source in (teacher, student)))
    left_out = {**tokens_from(teacher_tokenizer, size), **tokens_from(student_tokenizer, size)}
    notes = match.notes
    if left_out:
        notes = (*notes, _describe_left_out(left_out, size))
    return Pair(student_tokenizer, size, teacher, student, fresh, notes, left_out)


def _head_rows(source: ModelSource | None, trust_remote_code: bool) -> int:
    """Rows of a model's output head, by its configuration or adapter; no weights are read."""
    if source is None:
        return sys.maxsize
    brought = [adapter_rows(folder) for folder in reversed(source.adapters)]
    if found := [count for count in brought if count is not None]:
        return found[0]
    config = load_model_config(source, trust_remote_code)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else sys.maxsize


def _describe_left_out(left_out: Mapping[str, int], vocab_size: int) -> str:
    shown = ", ".join(f"{token!r} (id {i})" for token, i in list(left_out.items())[:_SHOWN])
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return (
        f"both models share the first {vocab_size} tokens; left out, and rows with them skipped: "
        f"{shown}{more}"
    )


def check_context(pair: Pair, max_length: int, trust_remote_code: bool) -> None:
    """Refuse rows that are longer than a model's context; only configurations are read.

    Args:
        pair: the models.
        max_length: tokens a row.
        trust_remote_code: whether a configuration may bring its own code.

    Raises:
        InputError: naming the model and the length it can take.
    """
    for source in (pair.teacher, pair.student):
        if source is not None:
            check_length(source, max_length, trust_remote_code)


def load_teacher(
    pair: Pair, config: ModelConfig, say: Callable[[str], None] | None = None
) -> PreTrainedModel | None:
    """Load the teacher's weights, where there is a teacher, in as many bits as was asked for."""
    if pair.teacher is None:
        return None
    model = load_model(pair.teacher, config.dtype, config.trust_remote_code, say=say)
    if config.teacher_quantization is not None:
        quantize(model)
    return model


def open_teacher(
    pair: Pair, config: ModelConfig, say: Callable[[str], None] | None = None
) -> FrozenTeacher | None:
    """Load the teacher, where there is one, and find out how it makes its logits.

    Args:
        pair: has the teacher.
        config: gives its type and bits.
        say: is told what of its files is not used.

    Raises:
        InputError: it cannot be loaded, or its head is narrower than the vocabulary.
    """
    from kdrun.models.heads import FrozenTeacher, find_split

    model = load_teacher(pair, config, say)
    if model is None:
        return None
    check_head(model, pair, str(pair.teacher))
    return FrozenTeacher(model, find_split(model))


def load_student(
    pair: Pair, config: ModelConfig, seed: int, say: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """Load the student's weights, or make those of the built-in student from the seed.

    Args:
        pair: has the student.
        config: gives its type.
        seed: of weights that are made, where the configuration gives none.
        say: is told what of its files is not used.

    Raises:
        InputError: it cannot be loaded, or its head is narrower than the vocabulary.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    # Before any weights are made: they, and those of adapters, must follow from the seed.
    set_seed(seed if config.init_seed is None else config.init_seed)
    if pair.fresh_student:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pair.student.path))
        model = model.to(getattr(torch, config.dtype))
    else:
        model = load_model(pair.student, config.dtype, config.trust_remote_code, say=say)
        check_head(model, pair, str(pair.student))
    if config.init_seed is not None:
        set_seed(seed)
    return model


def check_head(model: Any, pair: Pair, name: str) -> None:
    """Refuse a model whose head has fewer entries than its configuration states."""
    width = model.get_output_embeddings().weight.shape[0]
    if width < pair.vocab_size:
        raise InputError(
            f"{name}: its head has {width} entries, its configuration states {pair.vocab_size} or "
            "more; correct vocab_size in its config.json"
        )


def describe_model(model: Any) -> str:
    """Type and size of a model."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{model.config.model_type}, {size / 1e6:.2f} M parameters"


def describe_cut(widths: dict[str, int], vocab_size: int, say: Callable[[str], None]) -> None:
    """Say so where padded heads are cut to the tokenizer's size."""
    padded = {name: width for name, width in widths.items() if width > vocab_size}
    if padded:
        shown = ", ".join(f"{name} {width}" for name, width in padded.items())
        say(f"heads are cut to the tokenizer's {vocab_size} tokens before the softmax ({shown})")


def _locate(given: str, built_in: Any) -> ModelSource:
    return ModelSource(str(built_in)) if given == BUILT_IN else locate_model(given)
