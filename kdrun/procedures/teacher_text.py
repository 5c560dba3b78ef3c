"""Answers that the teacher generates once and that are kept for runs with the same prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kdrun.data.encoding import Example
from kdrun.errors import InputError
from kdrun.procedures.base import Origin, SessionProtocol
from kdrun.procedures.sampling import Sample

if TYPE_CHECKING:
    from pathlib import Path


_FORMAT = 1
"""Version of the answers, increased when the same prompts would get different answers."""


def teacher_rows(rows: Sequence[Any], session: SessionProtocol) -> list[Example]:
    """Replace the answers of rows with those of the teacher.

    All processes generate a part of the answers. The file of answers is named by a hash of
    everything that determines them: the teacher's weights, the prompts and the sampling.

    Args:
        rows: examples with ``input_ids`` and ``labels``; windows of text at their current position.
        session: the session with the teacher.

    Returns:
        The answered rows; rows with empty answers are skipped.

    Raises:
        InputError: all answers are empty.
    """
    prompts = [session.settings.prompt_of(rows[number]) for number in range(len(rows))]
    prompts = [prompt for prompt in prompts if prompt]
    file = _file(prompts, session)
    answers = None if file is None else _read(file, len(prompts), session.vocab_size)
    # All processes must take the same branch, even if their disks differ.
    if not all(session.gather([answers is not None])):
        session.say(f"procedure: the teacher answers {len(prompts)} prompts once")
        answers = _write_all(prompts, session)
        if file is not None and session.place.rank == 0:
            _save(file, answers)
    else:
        session.say(f"procedure: {len(prompts)} answers of the teacher, from {file}")
    assert answers is not None
    kept = [
        Sample(prompt, answer, Origin.TEACHER).example()
        for prompt, answer in zip(prompts, answers, strict=True)
        if not session.is_empty(answer)
    ]
    if len(kept) < len(prompts):
        session.say(
            f"procedure: {len(prompts) - len(kept)} of {len(prompts)} answers of the teacher are "
            "empty; their rows are skipped"
        )
    if not kept:
        raise InputError(
            "procedure: every answer of the teacher is empty; check the chat template and the "
            "output of kdrun generate"
        )
    return kept


def _write_all(prompts: Sequence[list[int]], session: SessionProtocol) -> list[list[int]]:
    rank, size = session.place.rank, session.place.size
    # Prompts of similar length are batched together, to reduce padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))[rank::size]
    chosen = [prompts[number] for number in order]
    texts = session.continuations(chosen, order, {Origin.TEACHER: 1.0}, what="teacher")
    pairs = zip(order, (text.tokens for text in texts), strict=True)
    found: dict[int, list[int]] = dict(session.gather(list(pairs)))
    return [found[number] for number in range(len(prompts))]


def _file(prompts: Sequence[list[int]], session: SessionProtocol) -> Path | None:
    if session.answers_folder is None:
        return None
    from kdrun.cache.fingerprint import print_teacher

    settings = session.settings
    sampled = settings.temperature > 0
    content = [
        _FORMAT,
        print_teacher(session.teacher).model_dump(),
        [settings.max_new_tokens, settings.temperature],
        [settings.top_p, settings.top_k, session.seed] if sampled else [],
        [sorted(session.stops), session.vocab_size],
        prompts,
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:40]
    return session.answers_folder / f"answers-{key}.json"


def _read(file: Path, count: int, vocab_size: int) -> list[list[int]] | None:
    """Read the answers of a file; None if it is missing or damaged."""
    token = Annotated[int, Field(ge=0, lt=vocab_size)]
    try:
        answers = TypeAdapter(list[list[token]]).validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
    return answers if len(answers) == count else None


def _save(file: Path, answers: Sequence[list[int]]) -> None:
    """Write a file atomically; without space or permission, nothing is kept."""
    from contextlib import suppress

    from kdrun.files import write_text

    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(answers))
