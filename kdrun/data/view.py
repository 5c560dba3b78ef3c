"""Adds to transformers' collators: what the teacher reads of an example, and where its answers are.

An example has one set of answer tokens and, if the teacher reads another prompt, two sequences that
contain them. The n-th target of one sequence is the n-th target of the other: nothing else relates
them, so that neither the lengths of the prompts nor padding matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from kdrun.data.collate import IGNORE_INDEX, teacher_side
from kdrun.data.encoding import Example
from kdrun.data.lazy import Lazy
from kdrun.data.templates import USUAL_RENDERING, Rendering

if TYPE_CHECKING:
    from kdrun.config.data_section import DataConfig


@dataclass(frozen=True)
class View:
    """How the teacher's conversations are encoded.

    Attributes:
        max_length: maximum number of tokens that the teacher reads.
        rendering: settings that determine their text besides the template.
        is_given: whether rows without messages for the teacher have a second sequence, too.
    """

    max_length: int
    rendering: Rendering = USUAL_RENDERING
    is_given: bool = False


def view_of(data: DataConfig) -> View:
    """Return the view of a run's rows."""
    own = Rendering.of(data)
    arguments = data.teacher_template_arguments
    rendering = own if arguments is None else replace(own, arguments=arguments)
    is_given = data.teacher_max_length is not None or arguments is not None
    return View(data.teacher_length, rendering, is_given)


class TeacherSide(Lazy[Any]):
    """A data set as the teacher reads it.

    Args:
        examples: the data set.
    """

    def __init__(self, examples: Any) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def element(self, number: int) -> Any:
        """Return one example."""
        return teacher_side(self._examples[number])


def join_prompts(
    ids: Sequence[int], answers: Sequence[range], context: Sequence[int], there: Sequence[range]
) -> tuple[list[int], list[range]]:
    """Return the teacher's conversation with the student's answer tokens in it.

    Both render the same words, but a chat template may write an answer differently after another
    prompt, and a tokenizer may join its first letters to what precedes them. The student is judged
    on its own tokens.

    Args:
        ids: the student's tokens.
        answers: its answers.
        context: the teacher's tokens.
        there: the same answers among them, as many.
    """
    joined: list[int] = []
    ranges: list[range] = []
    place = 0
    for own, other in zip(answers, there, strict=True):
        joined += context[place : other.start]
        ranges.append(range(len(joined), len(joined) + len(own)))
        joined += ids[own.start : own.stop]
        place = other.stop
    return [*joined, *context[place:]], ranges


def targets_in_both(
    answers: Sequence[range], max_length: int, there: Sequence[range], most: int
) -> list[tuple[int, int]]:
    """Return the positions of targets that fit on both sides, the student's and the teacher's.

    The first token of a row has nothing to be predicted from, on either side.
    """
    pairs = zip(chain.from_iterable(answers), chain.from_iterable(there), strict=True)
    return [(i, j) for i, j in pairs if 0 < i < max_length and 0 < j < most]


def example_of(
    ids: Sequence[int], context: Sequence[int], targets: Sequence[tuple[int, int]]
) -> Example:
    """Return an example with both sequences, cut after their last target."""
    kept = list(ids[: targets[-1][0] + 1]) if targets else []
    read = list(context[: targets[-1][1] + 1]) if targets else []
    labels, labels_there = [IGNORE_INDEX] * len(kept), [IGNORE_INDEX] * len(read)
    for own, other in targets:
        labels[own] = kept[own]
        labels_there[other] = read[other]
    return Example(
        input_ids=kept, labels=labels, teacher_input_ids=read, teacher_labels=labels_there
    )
