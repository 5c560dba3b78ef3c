"""Answers that the teacher generates once and that are kept for runs with the same prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
_AT_ONCE = 256
"""Prompts answered before their answers are written down."""


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
        answers = _write_all(prompts, session, file)
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


def _write_all(
    prompts: Sequence[list[int]], session: SessionProtocol, file: Path | None
) -> list[list[int]]:
    """Have every process write a part of the answers, and go on where an earlier run stopped.

    What is written is appended to a file of the process, so that days of a large teacher's work
    are not lost with one process. Answers depend on the prompt's number, not on the process.
    """
    from kdrun.quiet import make_console, show_progress

    rank, size = session.place.rank, session.place.size
    found: dict[int, list[int]] = {}
    for part in [] if file is None else sorted(file.parent.glob(f"{file.stem}.part-*")):
        found |= _read_part(part, len(prompts), session.vocab_size)
    if found:
        session.say(f"procedure: {len(found)} of the answers are there already; going on")
    # Prompts of similar length are batched together, to reduce padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))[rank::size]
    missing = [number for number in order if number not in found]
    own = None if file is None else file.with_name(f"{file.stem}.part-{rank}")
    tokens = 0
    with session.agreeing(), show_progress(make_console(), "answer", "tokens") as report:
        for start in range(0, len(missing), _AT_ONCE):
            numbers = missing[start : start + _AT_ONCE]
            chosen = [prompts[number] for number in numbers]
            texts = session.continuations(chosen, numbers, {Origin.TEACHER: 1.0}, what="teacher")
            new = {number: text.tokens for number, text in zip(numbers, texts, strict=True)}
            found |= new
            _append(own, new)
            tokens += sum(len(answer) for answer in new.values())
            if rank == 0 and len(missing) > _AT_ONCE:
                report(start + len(numbers), len(missing), tokens)
    pairs = [(number, found[number]) for number in order]
    every: dict[int, list[int]] = dict(session.gather(pairs))
    return [every[number] for number in range(len(prompts))]


def _append(file: Path | None, answers: Mapping[int, list[int]]) -> None:
    """Append answers to a file; without space or permission, they are not kept."""
    if file is None:
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as stream:
            stream.writelines(f"{json.dumps([n, answer])}\n" for n, answer in answers.items())


def _read_part(file: Path, count: int, vocab_size: int) -> dict[int, list[int]]:
    """Read the answers that a run wrote before it ended; a line that is cut off is none."""
    number = Annotated[int, Field(ge=0, lt=count)]
    token = Annotated[int, Field(ge=0, lt=vocab_size)]
    line = TypeAdapter(tuple[number, list[token]])
    found: dict[int, list[int]] = {}
    with suppress(OSError, UnicodeDecodeError):
        for text in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValidationError):
                place, answer = line.validate_json(text)
                found[place] = answer
    return found


def _file(prompts: Sequence[list[int]], session: SessionProtocol) -> Path | None:
    if session.answers_folder is None:
        return None
    settings = session.settings
    sampled = settings.temperature > 0
    content = [
        _FORMAT,
        session.teacher_print(),
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
    from kdrun.files import write_text

    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(answers))
        for part in file.parent.glob(f"{file.stem}.part-*"):
            part.unlink()
