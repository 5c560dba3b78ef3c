"""Teacher and student: compare tokenizers first, then load weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.builtin import STUDENT_DIR, TEACHER_DIR
from kdrun.config.base import BUILT_IN
from kdrun.config.sections import ModelConfig
from kdrun.errors import InputError
from kdrun.models.address import clean_address, is_address
from kdrun.models.cast import cast_weights
from kdrun.models.context import check_length, load_model_config
from kdrun.models.failures import one_clear_line
from kdrun.models.load import load_model
from kdrun.models.locate import ModelSource, at_revision, locate_model
from kdrun.models.merge import adapter_rows
from kdrun.models.nf4 import weights_in
from kdrun.models.placement import teacher_devices
from kdrun.models.quantize import quantize
from kdrun.models.self_teacher import is_self
from kdrun.models.stored import check_plain, check_stored
from kdrun.models.tokenizers import compare_tokenizers, load_tokenizer, tokens_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdrun.models.heads import FrozenTeacher


_SHOWN = 5


@dataclass(frozen=True)
class Pair:
    """Teacher and student before their weights are loaded.

    Attributes:
        tokenizer: the student's, which encodes for both.
        vocab_size: number of tokens that both models share; heads are cut to it.
        left_out: tokens, with their ids, that only one model has; rows with them are skipped.
        teacher: location of the teacher; None without one, if a server has it, or if the student
            is its own.
        student: location of the student.
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
    """Locate teacher and student, without loading anything.

    Raises:
        InputError: a model does not exist, or a revision has no effect.
    """
    teacher = None
    if is_address(config.teacher):
        _check_served(config)
    elif is_self(config.teacher):
        pass  # its tokenizer, head and context are the student's
    elif config.teacher is not None:
        found = _locate(config.teacher, TEACHER_DIR)
        teacher = at_revision(found, config.teacher_revision, "model.teacher_revision")
    elif config.teacher_revision is not None:
        raise InputError("model.teacher_revision has no effect without model.teacher; remove it")
    student = _locate(config.student, STUDENT_DIR)
    return teacher, at_revision(student, config.revision, "model.revision")


def _check_served(config: ModelConfig) -> None:
    """Refuse keys about the weights of a teacher that a server has.

    Raises:
        InputError: names the key.
    """
    clean_address(str(config.teacher), "model.teacher")
    for name in ("teacher_cache", "teacher_quantization", "teacher_revision", "teacher_device"):
        if getattr(config, name) is not None:
            raise InputError(
                f"model.{name} has no effect on a teacher that a server has; remove it"
            )


def find_pair(config: ModelConfig) -> Pair:
    """Locate both models and compare their tokenizers; no weights are loaded.

    Raises:
        InputError: a model does not exist, or the tokenizers differ.
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
    stored = [check_stored(source, trust) for source in (teacher, student) if source is not None]
    if teacher is not None and config.teacher_quantization is not None:
        check_plain(teacher, trust)
    notes = (*match.notes, *(note for note in dict.fromkeys(stored) if note is not None))
    if left_out:
        notes = (*notes, _describe_left_out(left_out, size))
    return Pair(student_tokenizer, size, teacher, student, fresh, notes, left_out)


def _head_rows(source: ModelSource | None, trust_remote_code: bool) -> int:
    """Return the rows of a model's output head, by its configuration or adapter."""
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
        f"both models share the first {vocab_size} tokens; the others are excluded, and rows with "
        f"them are skipped: {shown}{more}"
    )


def check_context(
    pair: Pair,
    max_length: int,
    trust_remote_code: bool,
    teacher_max_length: int | None = None,
    is_own_teacher: bool = False,
) -> None:
    """Refuse rows that are longer than a model's context, reading only configurations.

    Args:
        pair: the models.
        max_length: tokens per row.
        trust_remote_code: whether a configuration may run its own code.
        teacher_max_length: tokens that the teacher reads of a row; None for the same.
        is_own_teacher: whether the student reads them.

    Raises:
        InputError: the rows are too long; names the model and its maximum.
    """
    if pair.teacher is not None:
        longer = teacher_max_length is not None and teacher_max_length != max_length
        key = "data.teacher_max_length" if longer else "data.max_length"
        length = teacher_max_length or max_length
        check_length(pair.teacher, length, trust_remote_code, key)
    check_length(pair.student, max_length, trust_remote_code)
    if is_own_teacher and teacher_max_length is not None and teacher_max_length > max_length:
        check_length(pair.student, teacher_max_length, trust_remote_code, "data.teacher_max_length")


def load_teacher(
    pair: Pair, config: ModelConfig, say: Callable[[str], None] | None = None
) -> PreTrainedModel | None:
    """Load the teacher's weights, if there is a teacher, with the configured quantisation."""
    if pair.teacher is None:
        return None
    model = load_model(
        pair.teacher,
        config.teacher_type,
        config.trust_remote_code,
        say=say,
        attention=config.attention,
        plain=config.teacher_quantization is not None,
    )
    if config.teacher_quantization is not None:
        quantize(model, config.teacher_quantization)
    return model


def open_teacher(
    pair: Pair, config: ModelConfig, say: Callable[[str], None] | None = None
) -> FrozenTeacher | None:
    """Load the teacher, if there is one, and determine how it computes its logits.

    Args:
        pair: locates the teacher.
        config: provides its data type and quantisation.
        say: called with a line for each unused file.

    Raises:
        InputError: it cannot be loaded, or its head is narrower than the vocabulary.
    """
    from kdrun.models.heads import FrozenTeacher, find_split

    model = load_teacher(pair, config, say)
    if model is None:
        return None
    check_head(model, pair, str(pair.teacher))
    return FrozenTeacher(model, find_split(model), teacher_devices(config.teacher_device))


def load_student(
    pair: Pair, config: ModelConfig, seed: int, say: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """Load the student's weights, or initialise those of the built-in student from the seed.

    Args:
        pair: locates the student.
        config: provides its data type.
        seed: seed of initial weights, if the configuration gives none.
        say: called with a line for each unused file.

    Raises:
        InputError: it cannot be loaded, or its head is narrower than the vocabulary.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    # Before any weights are initialised: they, and those of adapters, must depend on the seed only.
    set_seed(seed if config.init_seed is None else config.init_seed)
    if pair.fresh_student:
        shape = AutoConfig.from_pretrained(pair.student.path)
        options = {} if config.attention is None else {"attn_implementation": config.attention}
        with one_clear_line(pair.student, "model"):
            model = AutoModelForCausalLM.from_config(shape, **options)
        cast_weights(model, getattr(torch, config.student_type))
    else:
        model = load_model(
            pair.student,
            config.student_type,
            config.trust_remote_code,
            say=say,
            attention=config.attention,
            plain=True,
        )
        check_head(model, pair, str(pair.student))
    if config.init_seed is not None:
        set_seed(seed)
    return model


def check_head(model: Any, pair: Pair, name: str) -> None:
    """Refuse a model whose head has fewer entries than its configuration states."""
    width = model.get_output_embeddings().weight.shape[0]
    if width < pair.vocab_size:
        raise InputError(
            f"{name}: its head has {width} entries, but its configuration states {pair.vocab_size} "
            "or more; correct vocab_size in its config.json"
        )


def describe_model(model: Any) -> str:
    """Describe type and size of a model."""
    size = weights_in(model)
    return f"{model.config.model_type}, {size / 1e6:.2f} M parameters"


def describe_cut(widths: dict[str, int], vocab_size: int, say: Callable[[str], None]) -> None:
    """Report padded heads that are cut to the tokenizer's size."""
    padded = {name: width for name, width in widths.items() if width > vocab_size}
    if padded:
        shown = ", ".join(f"{name} {width}" for name, width in padded.items())
        say(f"heads are cut to the tokenizer's {vocab_size} tokens before the softmax ({shown})")


def _locate(given: str, built_in: Any) -> ModelSource:
    return ModelSource(str(built_in)) if given == BUILT_IN else locate_model(given)
