"""What a procedure works with in a run: writers, random decisions, its state, what it counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kdrun.data.encode import Example
from kdrun.errors import TrainingError
from kdrun.models.ends import own_ends, stop_tokens
from kdrun.procedures import sampling
from kdrun.procedures.base import ROLLOUT, MicroBatch, Origin, Procedure
from kdrun.procedures.decode import Draw, Writer, Written, decode
from kdrun.procedures.sampling import Sample, Sampling, collate

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of the run.

    Attributes:
        rank: of this process.
        size: how many there are.
        batch_size: rows of a micro-batch.
    """

    rank: int = 0
    size: int = 1
    batch_size: int = 8

    def first_row(self, number: int) -> int:
        """Which row of the step is the first of this process's micro-batch of a number."""
        return (number * self.size + self.rank) * self.batch_size


@dataclass
class Counts:
    """What a process has written so far; shares are of rows that were trained on."""

    generated_tokens: int = 0
    empty_generations: int = 0
    answers: int = 0
    student_rows: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass
class Session:
    """A procedure at work.

    Attributes:
        procedure: its parameters and hooks.
        settings: how answers are sampled.
        student: writes as it is at the moment.
        teacher: writes too; None without a live teacher.
        tokenizer: gives padding and end tokens.
        vocab_size: heads are cut to this many tokens before anything is drawn.
        seed: of all random decisions.
        place: of this process.
        answers_folder: where texts that the teacher wrote are kept for other runs; None keeps none.
        text: windows of plain text, for procedures that take some.
        say: shows a line to the user.
        state: what the procedure carries from step to step.
        step: optimiser steps done.
        steps: of the whole training.
        kd_ratio: weight of the loss at that step.
        counts: what this process has written.
    """

    procedure: Procedure
    settings: Sampling
    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    seed: int = 0
    place: Place = field(default_factory=Place)
    answers_folder: Path | None = None
    text: Sequence[Example] | None = None
    say: Callable[[str], None] = lambda line: None
    state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    steps: int = 1
    kd_ratio: float = 1.0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        """Begin with the procedure's first state.

        Raises:
            InputError: the tokenizer has no end token.
        """
        sampling.need_end_token(self.tokenizer)
        self.state = self.procedure.initial_state()
        self._stops: set[int] | None = None

    @property
    def stops(self) -> set[int]:
        """The tokens that end an answer: those of either model, since both may write."""
        if self._stops is None:
            teacher = set() if self.teacher is None else own_ends(self.teacher)
            inside = {token for token in teacher if token < self.vocab_size}
            self._stops = stop_tokens(self.student, self.tokenizer) | inside
        return self._stops

    @property
    def pad(self) -> int:
        """What prompts are padded with."""
        given = self.tokenizer.pad_token_id
        return min(self.stops) if given is None else given

    def draw(self, *what: object) -> float:
        """A random number in [0, 1) of this step, the same on every process."""
        return sampling.draw(self.seed, self.step, *what)

    def order(self, count: int, *what: object) -> list[int]:
        """The numbers below ``count`` in a random order, likewise."""
        return sampling.shuffled(count, self.seed, self.step, *what)

    def text_rows(self, number: int, count: int) -> list[Example]:
        """Windows of :attr:`text`, drawn for each row of a micro-batch of a number."""
        assert self.text is not None
        first = self.place.first_row(number)
        places = [int(self.draw("text", first + row) * len(self.text)) for row in range(count)]
        return [self.text[place] for place in places]

    def micro_batches(self, given: Sequence[MicroBatch]) -> list[MicroBatch]:
        """The micro-batches of a step, as the procedure wants them."""
        made = self.procedure.batches(given, self)
        for batch in made:
            origins = batch.get(ROLLOUT, {}).get("origins", (0,) * len(batch["input_ids"]))
            self.counts.rows += len(origins)
            self.counts.student_rows += sum(origin == Origin.STUDENT for origin in origins)
        return made

    def collate(self, rows: Sequence[Sample | Example], like: MicroBatch) -> MicroBatch:
        """A micro-batch of rows, on the device of another one."""
        return collate(rows, self.tokenizer.pad_token_id, like["input_ids"].device)

    def write(
        self,
        examples: Sequence[Example],
        number: int,
        writers: Mapping[Origin, float] | None = None,
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Sample]:
        """Answers to what rows ask.

        Args:
            examples: rows, whose own answers are left aside.
            number: of the micro-batch in the step.
            writers: who writes, by shares that add up to 1; by default the student alone. A
                mixture counts as the student's.
            with_log_probs: give ``values``: ``drawn``, the log-probability of each token under the
                distribution it was drawn from, and ``student`` and ``teacher``, those of the two
                models at temperature 1.
            what: tells several answers to the same row in one step apart.

        Returns:
            A sample for each row. An answer of an end token alone is empty, and counted.
        """
        writers = writers or {Origin.STUDENT: 1.0}
        origin = Origin.TEACHER if set(writers) == {Origin.TEACHER} else Origin.STUDENT
        prompts = [self.settings.prompt_of(example) for example in examples]
        first = self.place.first_row(number)
        asked = [place for place, prompt in enumerate(prompts) if prompt]
        written = iter(
            self.continuations(
                [prompts[place] for place in asked],
                [first + place for place in asked],
                writers,
                with_log_probs,
                what,
            )
        )
        samples = []
        for prompt, example in zip(prompts, examples, strict=True):
            if prompt:
                samples.append(self._sample(prompt, next(written), list(writers), origin))
            else:
                samples.append(Sample(list(example["input_ids"][:1]), [], origin))
        return samples

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        writers: Mapping[Origin, float],
        with_log_probs: bool = False,
        what: str = "answer",
    ) -> list[Written]:
        """Continue prompts, in batches.

        Args:
            prompts: token ids.
            rows: numbers of the prompts among those of the step, over all processes: what is
                written to a prompt follows from seed, step and this number.
            writers: as for :meth:`write`.
            with_log_probs: likewise.
            what: likewise.

        Raises:
            TrainingError: probabilities are NaN; the message names the step.
        """
        started = time.perf_counter()
        settings = self.settings
        models = {Origin.STUDENT: self.student, Origin.TEACHER: self.teacher}
        voices = [Writer(models[origin], share) for origin, share in writers.items()]
        found: list[Written] = []
        try:
            for part in sampling.parts(len(prompts), settings.batch_size):
                found += decode(
                    voices,
                    prompts[part],
                    sampling.uniforms(
                        self.seed, self.step, rows[part], settings.max_new_tokens, what
                    ),
                    max_new_tokens=settings.max_new_tokens,
                    draw=Draw(settings.temperature, settings.top_p, settings.top_k),
                    stops=self.stops,
                    pad=self.pad,
                    vocab_size=self.vocab_size,
                    with_log_probs=with_log_probs,
                )
        except TrainingError as error:
            raise TrainingError(f"step {self.step + 1}: {error}") from error
        self.counts.seconds += time.perf_counter() - started
        self.counts.generated_tokens += sum(len(text.tokens) for text in found)
        self.counts.answers += len(found)
        self.counts.empty_generations += sum(self.is_empty(text.tokens) for text in found)
        return found

    def is_empty(self, answer: Sequence[int]) -> bool:
        """Whether an answer is empty or only an end token."""
        return len(answer) == 0 or (len(answer) == 1 and answer[0] in self.stops)

    def gather(self, things: Sequence[Any]) -> list[Any]:
        """The things of all processes, those of the first one first."""
        if self.place.size == 1:
            return list(things)
        from accelerate.utils import gather_object

        return list(gather_object(list(things)))

    def evaluated(self, cross_entropy: float) -> None:
        """Tell the procedure of an evaluation."""
        self.procedure.evaluated(self.state, cross_entropy)

    def figures(self) -> dict[str, float]:
        """What is logged: counts of all processes since the start, and the procedure's own."""
        # A plain sum of a few numbers: everyone has to take part.
        every = self.gather([vars(self.counts)])
        total = {name: sum(counts[name] for counts in every) for name in vars(self.counts)}
        return {
            "generated_tokens": total["generated_tokens"],
            "generation_seconds": round(max(counts["seconds"] for counts in every), 3),
            "student_share": round(total["student_rows"] / max(1, total["rows"]), 6),
            "empty_generations": total["empty_generations"],
            **self.procedure.figures(self.state),
        }

    def remarks(self, figures: Mapping[str, float]) -> list[str]:
        """What is to be said after training, a line each."""
        lines = []
        if figures["generated_tokens"]:
            lines.append(
                f"{figures['generated_tokens']:,} tokens were generated in "
                f"{figures['generation_seconds']:.0f} s"
            )
        if figures["empty_generations"]:
            lines.append(
                f"{figures['empty_generations']} sampled answers were empty and were skipped"
            )
        return [*lines, *self.procedure.remarks(self.state)]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON can hold it; every process has to call it."""
        every = self.gather([vars(self.counts)])
        return {
            "procedure": self.procedure.model_dump(mode="json"),
            "kind": type(self.procedure).__name__,
            "state": self.state,
            "counts": every,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, also on another number of processes.

        Raises:
            TrainingError: it is of another procedure.
        """
        own = (type(self.procedure).__name__, self.procedure.model_dump(mode="json"))
        if (saved["kind"], saved["procedure"]) != own:
            raise TrainingError(
                f"the saved state belongs to {saved['kind']} {saved['procedure']}, not to {own[0]} "
                f"{own[1]}"
            )
        self.state = dict(saved["state"])
        mine = saved["counts"][self.place.rank :: self.place.size]
        self.counts = Counts(
            **{name: sum(counts[name] for counts in mine) for name in vars(Counts())}
        )

    def _sample(
        self, prompt: list[int], text: Written, writers: Sequence[Origin], origin: Origin
    ) -> Sample:
        answer = [] if self.is_empty(text.tokens) else text.tokens
        values: dict[str, Sequence[float]] = {}
        if text.drawn and answer:
            values = {"drawn": text.drawn}
            for writer, own in zip(writers, text.log_probs, strict=True):
                values[writer.name.lower()] = own
        return Sample(prompt, answer, origin, values)
