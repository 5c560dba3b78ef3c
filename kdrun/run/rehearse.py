"""Rehearsal of the end of a run, at its beginning, with the untrained student.

A student that cannot be saved or loaded again is reported before training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.cache.fingerprint import print_tokenizer
from kdrun.data.collate import IGNORE_INDEX, teacher_side
from kdrun.errors import InputError
from kdrun.files import remove
from kdrun.models.heads import causal_lm
from kdrun.run import folder as runs
from kdrun.run.trackers import start_trackers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdrun.config.sections import RunConfig
    from kdrun.evaluation.answers import Question
    from kdrun.run.build import Built
    from kdrun.run.load import Loaded
    from kdrun.run.prepare import Prepared
    from kdrun.run.start import Start

_NEW_TOKENS = 2
_LOST_MASS = 0.01


def rehearse(built: Built, loaded: Loaded, start: Start) -> None:
    """Save, load, answer, merge and report, on a small scale.

    Only one weight is saved, so that large models take no time: what fails at the end of a run is
    its settings, its tokenizer, its adapters, or a tracker.

    Args:
        built: the run, before its first step.
        loaded: provides the student's questions.
        start: provides the folder.

    Raises:
        InputError: a part would fail; gives the reason.
    """
    trainer, config = built.trainer, built.config
    if start.world.is_main:
        with _reporting("the student cannot be saved"):
            folder = start.folder / runs.CHECKPOINTS / runs.REHEARSAL
            _save_and_read(trainer, folder, config.model.trust_remote_code)
    if start.world.size == 1:
        if loaded.questions:
            with _reporting("the student cannot generate answers"):
                _answer(trainer, loaded.questions)
        if config.lora.rank is not None and config.lora.merge:
            with _reporting("lora.merge=true: the adapters cannot be merged"):
                _merge(trainer.model, config)
    start_trackers(trainer, config.training.report_to)


def tell_lost_mass(loaded: Loaded, prepared: Prepared, batch_size: int, start: Start) -> None:
    """Report how much of its probability the teacher assigns to excluded tokens.

    Measured on the supervised positions of the first batch; small shares are not reported.

    Args:
        loaded: provides the teacher.
        prepared: provides the rows, and the tokens that only one model has.
        batch_size: rows per batch.
        start: displays the line.
    """
    import torch

    from kdrun.models.heads import FrozenTeacher

    teacher, left_out = loaded.teacher.training, prepared.pair.left_out
    if not left_out or not isinstance(teacher, FrozenTeacher):
        return
    model: Any = teacher.model
    width = model.get_output_embeddings().weight.shape[0]
    ids = [number for number in left_out.values() if number < width]
    rows: Any = prepared.examples.train
    total, positions = 0.0, 0
    for number in range(min(batch_size, len(rows))):
        row = teacher_side(rows[number])
        ids_of_row = torch.tensor([row["input_ids"]], device=model.device)
        targets = torch.tensor(row["labels"][1:], device=model.device) != IGNORE_INDEX
        with torch.no_grad():
            logits = model(input_ids=ids_of_row, use_cache=False).logits[0, :-1][targets]
        total += float(logits.float().softmax(-1)[:, ids].sum())
        positions += len(logits)
    if positions and total / positions > _LOST_MASS:
        start.say(
            f"the teacher assigns {total / positions:.1%} of its probability to excluded tokens, "
            "at the supervised positions of the first batch; the student does not learn them"
        )


@contextmanager
def _reporting(what: str) -> Iterator[None]:
    """Turn any failure into one line; disk errors are reported elsewhere.

    Raises:
        InputError: instead of the failure, which is its cause.
    """
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:  # libraries raise errors of any type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} ({reason}); nothing was trained") from error


def _save_and_read(trainer: Any, folder: Path, trust_remote_code: bool) -> None:
    """Save everything but the weights, plus one weight, and load it again."""
    from transformers import AutoTokenizer, GenerationConfig

    inner, tokenizer = causal_lm(trainer.model), trainer.processing_class
    remove(folder)
    try:
        # Of a sharded model all processes would have to take part, also in a look at its state.
        if not trainer.is_distributed_loading_by_transformers:
            name, weight = min(inner.state_dict().items(), key=lambda item: item[1].numel())
            inner.save_pretrained(folder, state_dict={name: weight})
        inner.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        inner.generation_config.save_pretrained(folder)
        kept = GenerationConfig.from_pretrained(folder)
        if kept.eos_token_id != inner.generation_config.eos_token_id:
            raise InputError("the student's end tokens are lost when it is saved")
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _same_tokenizer(tokenizer, again)
    finally:
        remove(folder)


def _same_tokenizer(tokenizer: Any, again: Any) -> None:
    if print_tokenizer(tokenizer) != print_tokenizer(again):
        raise InputError(
            "the student's tokenizer changes when it is saved and loaded again; first save it with "
            "its own class in the student's folder"
        )


def _answer(trainer: Any, questions: Sequence[Question]) -> None:
    from kdrun.models.generation import generate

    generate(
        causal_lm(trainer.model),
        trainer.processing_class,
        [questions[0].prompt_ids],
        max_new_tokens=_NEW_TOKENS,
    )


def _merge(model: Any, config: RunConfig) -> None:
    """Merge adapters of the same kind into a model of the same shape without content."""
    import torch
    from transformers import AutoModelForCausalLM

    from kdrun.models.adapters import add_adapters

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        shape = AutoModelForCausalLM.from_config(
            causal_lm(model).config, trust_remote_code=config.model.trust_remote_code
        )
        add_adapters(shape, config.lora, "unused", config.training.seed).merge_and_unload()
