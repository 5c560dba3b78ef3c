"""Prompts of rows, and rows of prompts and written answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.data.collate import IGNORE_INDEX, Collator, shift_labels
from kdrun.data.encode import Example
from kdrun.errors import InputError
from kdrun.procedures.base import ROLLOUT, MicroBatch, Origin

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.sections import ProcedureConfig


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        max_new_tokens: where an answer is cut.
        max_length: the most tokens of prompt and answer together.
        temperature: of the sampling; 0 takes the most likely token.
        top_p: see :class:`kdrun.procedures.decode.Draw`.
        top_k: likewise.
        batch_size: prompts that are answered at once.
    """

    max_new_tokens: int = 64
    max_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 16

    @classmethod
    def of(cls, given: ProcedureConfig, max_length: int) -> Sampling:
        """The sampling of a run.

        Args:
            given: the section of the procedure.
            max_length: tokens a row.

        Raises:
            InputError: answers that leave no room for a prompt.
        """
        new = given.max_new_tokens or max_length // 2
        if new >= max_length:
            raise InputError(
                f"procedure.max_new_tokens={new}: leaves no room for a prompt in "
                f"data.max_length={max_length}; lower it, or raise --max-length"
            )
        return cls(
            new,
            max_length,
            given.sampling_temperature,
            given.top_p,
            given.top_k,
            given.batch_size,
        )

    def prompt_of(self, example: Example) -> list[int]:
        """What a row asks: all that stands before its last answer.

        A window of plain text asks to be continued: its prompt leaves room for an answer.

        Returns:
            Token ids; none where the row supervises nothing or leaves no room.
        """
        labels = example["labels"]
        start = _last_answer(labels)
        if start == 0:
            start = max(0, len(labels) - self.max_new_tokens)
        if start is None or start + self.max_new_tokens > self.max_length:
            return []
        return list(example["input_ids"][:start])


@dataclass(frozen=True)
class Sample:
    """A prompt and an answer that a model wrote.

    Attributes:
        prompt: token ids.
        answer: token ids, the end token included where it was drawn; none where the answer is
            empty.
        origin: who wrote it.
        values: numbers of the answer's tokens, by name.
    """

    prompt: list[int]
    answer: list[int]
    origin: Origin
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def example(self) -> Example:
        """As a row whose targets are the answer, its end token included, and nothing else."""
        labels = [IGNORE_INDEX] * len(self.prompt) + self.answer
        return Example(input_ids=self.prompt + self.answer, labels=labels)


def longest_written(examples: Iterable[Any], sampling: Sampling) -> int:
    """Tokens of the longest row that an answer to one of the prompts can make."""
    prompts = (sampling.prompt_of(example) for example in examples)
    return max(len(prompt) for prompt in prompts) + sampling.max_new_tokens


def sample_of(example: Example, origin: Origin) -> Sample:
    """A row of the data as a prompt and its last answer."""
    start = _last_answer(example["labels"]) or 0
    ids = list(example["input_ids"])
    return Sample(ids[:start], ids[start:], origin)


def examples_of(batch: MicroBatch) -> list[Example]:
    """The rows of a micro-batch without their padding."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    return [
        Example(input_ids=row[:length], labels=own[:length])
        for row, own, length in zip(ids, labels, lengths, strict=True)
    ]


def collate(rows: Sequence[Sample | Example], pad: int | None, device: Any = None) -> MicroBatch:
    """A micro-batch of rows of the data and of written ones, which knows which is which."""
    import torch

    examples: Any = [row.example() if isinstance(row, Sample) else row for row in rows]
    batch: MicroBatch = Collator(pad)(examples)
    names = sorted({name for row in rows if isinstance(row, Sample) for name in row.values})
    values = {name: torch.zeros(batch["labels"].shape, dtype=torch.float32) for name in names}
    for number, row in enumerate(rows):
        if isinstance(row, Sample):
            first = len(row.prompt) - 1  # the position whose target is the first token
            for name, own in row.values.items():
                values[name][number, first : first + len(own)] = torch.tensor(own)
    origins = tuple(int(row.origin) if isinstance(row, Sample) else 0 for row in rows)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    moved = {name: tensor.to(device) for name, tensor in values.items()}
    return {**batch, ROLLOUT: {"origins": origins, "values": moved}}


def need_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that no answer would ever end with.

    Raises:
        InputError: with the cure.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "procedure: the tokenizer has no end-of-text token, so answers would never end; "
            "set its eos_token"
        )


def uniforms(seed: int, step: int, rows: Sequence[int], count: int, what: str) -> Tensor:
    """Random numbers ``[rows, count]`` in [0, 1) that follow from these arguments alone.

    Args:
        seed: of the run.
        step: of the training.
        rows: numbers of the rows among those of the step, over all processes.
        count: numbers a row.
        what: they are for.
    """
    import torch

    found = torch.empty(len(rows), count)
    for place, row in enumerate(rows):
        generator = torch.Generator().manual_seed(_hash(seed, step, what, row))
        found[place] = torch.rand(count, generator=generator)
    return found


def draw(seed: int, step: int, *what: object) -> float:
    """A random number in [0, 1), the same on every process."""
    return (_hash(seed, step, *what) >> 9) / 2**53


def shuffled(count: int, seed: int, step: int, *what: object) -> list[int]:
    """The numbers below ``count`` in a random order, the same on every process."""
    import torch

    generator = torch.Generator().manual_seed(_hash(seed, step, *what))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def parts(count: int, size: int) -> Iterator[slice]:
    """Slices that take ``count`` things a few at a time."""
    return (slice(first, first + size) for first in range(0, count, size))


def _hash(*what: object) -> int:
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _last_answer(labels: Sequence[int]) -> int | None:
    """Where the last answer begins; None without one."""
    stop = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORE_INDEX), None)
    if stop is None:
        return None
    return next((i for i in range(stop, 0, -1) if labels[i - 1] == IGNORE_INDEX), 0)


def tokens_by_origin(batches: list[dict[str, Any]]) -> Tensor:
    """Supervised tokens of micro-batches by the origin of their rows, ``[len(Origin)]``."""
    import torch

    found = torch.zeros(len(Origin), dtype=torch.int64)
    for batch in batches:
        labels = batch["shift_labels"] if "shift_labels" in batch else shift_labels(batch["labels"])
        rows = (labels != IGNORE_INDEX).sum(-1).cpu()
        origins = batch.get(ROLLOUT, {}).get("origins", (Origin.DATA,) * len(rows))
        found.index_add_(0, torch.tensor([int(origin) for origin in origins]), rows)
    return found
