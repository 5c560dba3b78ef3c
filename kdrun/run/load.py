"""The models of a run: teacher and student with their weights, and the student's questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cache.choose import ChosenTeacher, choose_teacher
from kdrun.cache.fingerprint import TeacherPrint, print_teacher
from kdrun.data.templates import Rendering
from kdrun.errors import InputError
from kdrun.losses.build import notes_on_names, plain_objective
from kdrun.models.adapters import add_adapters, describe_adapters
from kdrun.models.address import is_address
from kdrun.models.attention import check_trains
from kdrun.models.base_print import print_weights
from kdrun.models.context import context_limit
from kdrun.models.ends import own_ends, settle_generation, stop_tokens, taught_ends
from kdrun.models.locate import ModelSource
from kdrun.models.pairs import Pair, describe_cut, describe_model, load_student
from kdrun.models.placement import teacher_devices
from kdrun.models.quantize import quantize
from kdrun.models.self_teacher import SelfTeacher, is_self
from kdrun.run import folder as runs
from kdrun.run.own_teacher import choose_self
from kdrun.run.precision import notes_on_types

if TYPE_CHECKING:
    from kdrun.config.sections import RunConfig
    from kdrun.config.training_sections import LoraConfig
    from kdrun.evaluation.answers import Question
    from kdrun.run.prepare import Prepared
    from kdrun.run.start import Start


@dataclass(frozen=True)
class Loaded:
    """The models of a run.

    Attributes:
        teacher: the model that is distilled and evaluated against.
        student: the causal language model, wrapped by peft if adapters are trained.
        questions: held-out prompts that the trained student answers.
        initial: fingerprint of the student's weights before the first step.
        base: fingerprint of the files of the adapters' base model; None without adapters.
    """

    teacher: ChosenTeacher
    student: Any
    questions: Sequence[Question]
    initial: TeacherPrint
    base: str | None = None


def load(config: RunConfig, prepared: Prepared, start: Start) -> Loaded:
    """Load teacher and student, and add adapters to the student.

    Args:
        config: names the models, the loss, the adapters and the questions.
        prepared: provides the pair and its examples.
        start: provides folder and processes, and displays what is loaded.

    Raises:
        InputError: a model or a cache does not suit the run.
    """
    from kdrun.evaluation.answers import Asked, choose_questions
    from kdrun.models.heads import FrozenTeacher
    from kdrun.models.packing import check_packing

    check_trains(config.model.attention)
    teacher_devices(config.model.teacher_device)
    pair = prepared.pair
    objective = plain_objective(config.loss, config.token_weight)
    teacher = ChosenTeacher()
    if is_address(config.model.teacher):
        from kdrun.run.served import choose_served

        teacher = choose_served(config, prepared, objective, start)
    elif not is_self(config.model.teacher):
        sections = (config.model, config.loss)
        teacher = choose_teacher(*sections, pair, prepared.examples, objective)
    student: Any = load_student(pair, config.model, config.training.seed, start.say)
    if is_self(config.model.teacher):
        teacher = choose_self(config, prepared.examples, student)
    widths = {"student": student.get_output_embeddings().weight.shape[0], **teacher.widths}
    describe_cut(widths, pair.vocab_size, start.say)
    of_student = Asked(pair.tokenizer, context_limit(student.config), Rendering.of(config.data))
    questions, asked = choose_questions(prepared.held_out, of_student, config.evaluation)
    for line in (*notes_on_names(config.loss.spec), *notes_on_types(config)):
        start.say(line)
    for line in (*teacher.notes, f"student: {describe_model(student)}"):
        start.say(line)
    if asked is not None:
        start.say(asked)
    if config.data.packing:
        rows = config.training.batch_size
        check_packing(student, str(pair.student), rows)
        if isinstance(teacher.training, FrozenTeacher):
            check_packing(teacher.training.model, str(pair.teacher), rows)
    for line in _settle_ends(student, teacher, prepared, config.procedure.spec is not None):
        start.say(line)
    initial = print_teacher(student)
    base = None
    if config.lora.rank is not None:
        base, student = _with_adapters(student, pair, config.lora, config.training.seed, start)
        start.say(describe_adapters(student, config.lora))
        if isinstance(teacher.training, SelfTeacher):
            teacher.training.begin(student)
    if questions and start.world.size > 1:
        raise InputError(
            "evaluation.answers: not supported in several processes; set it to 0, and run 'kdrun "
            "evaluate' on the trained student"
        )
    return Loaded(teacher, student, questions, initial, base)


def _settle_ends(
    student: Any, teacher: ChosenTeacher, prepared: Prepared, written: bool
) -> list[str]:
    """Add every token that ends the training answers to the student's generation settings.

    Args:
        student: a causal language model.
        teacher: the teacher, which may generate answers.
        prepared: provides the rows.
        written: whether a procedure lets models generate answers.

    Returns:
        Lines to report.
    """
    from kdrun.data.prepare import examples_in
    from kdrun.models.heads import FrozenTeacher

    tokenizer = prepared.pair.tokenizer
    usual = stop_tokens(student, tokenizer)
    ends = usual | taught_ends(examples_in(prepared.examples.train), tokenizer)
    if written and isinstance(teacher.training, FrozenTeacher):
        inside = prepared.pair.vocab_size
        ends |= {token for token in own_ends(teacher.training.model) if token < inside}
    notes = settle_generation(student, ends, tokenizer.pad_token_id)
    more = sorted(ends - usual)
    if more:
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in more)
        notes.append(f"the student also learns to end its answers with {names}")
    return notes


def _with_adapters(
    student: Any, pair: Pair, lora: LoraConfig, seed: int, start: Start
) -> tuple[str | None, Any]:
    """Add adapters to the student, and save its base model under the name that they record.

    Returns:
        The fingerprint of the base model's files, on the main process, and the student.
    """
    base, source = pair.student.name, pair.student
    if pair.fresh_student:  # adapters need these weights, which exist nowhere else
        base = str((start.folder / runs.BASE).resolve())
        if start.world.is_main:
            student.save_pretrained(base)
            pair.tokenizer.save_pretrained(base)
        source = ModelSource(base)
    elif pair.student.is_local:
        base = str(Path(base).resolve())
    if lora.quantization is not None:
        quantize(student, lora.quantization)
    # Otherwise other processes could read the base model before it is written.
    below = print_weights(source) if start.world.is_main else None
    return below, add_adapters(student, lora, base, seed, pair.student.revision)
