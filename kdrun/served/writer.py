"""Text that a server writes: a teacher's, or that of the student whose weights it takes in."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.files import remove
from kdrun.models.merge import merged_weights
from kdrun.served.client import ServerError
from kdrun.served.engine import Drawing, Engine
from kdrun.served.workers import Workers

if TYPE_CHECKING:
    from kdrun.served.engine import Answer

_AGREE = 0.15
"""How far log-probabilities of a server in 16 bits are from those of the student."""
_PROBED, _PROBED_TOKENS = 5, 16
PROBE = (
    "Distillation trains a small model on the distributions of a large one: 12 + 30 = 42, "
    "and the capital of France is Paris."
)
"""A row by which a model on a server is recognised."""


class ServedWriter:
    """A model on a server that continues prompts.

    Args:
        engine: the server.
        model: name of the model on it.
        concurrency: requests at a time in this process.
        vocab_size: tokens that the run knows.
    """

    def __init__(self, engine: Engine, model: str, concurrency: int, vocab_size: int) -> None:
        self.engine, self.model, self._vocab_size = engine, model, vocab_size
        self._workers = Workers(concurrency)

    def continuations(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawing: Drawing
    ) -> list[Answer]:
        """Continue prompts.

        Args:
            prompts: token ids.
            seeds: one for each prompt.
            drawing: how tokens are drawn.

        Raises:
            ServerError: the server fails, or writes a token that the run does not know.
        """
        futures = [
            self._workers.submit(self.engine.write, self.model, prompt, drawing, seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        answers = [self.engine.client.result_of(future) for future in futures]
        unknown = max((max(answer.tokens, default=0) for answer in answers), default=0)
        if unknown >= self._vocab_size:
            raise ServerError(
                f"{self.engine.client.address} wrote token {unknown}, which is outside the "
                f"vocabulary of {self._vocab_size} tokens that teacher and student share"
            )
        return answers


def identity(engine: Engine, model: str, tokenizer: Any) -> list[Any]:
    """Return what identifies a model on a server: its name, and what it writes greedily.

    Its log-probabilities would differ by rounding each time.

    Args:
        engine: the server.
        model: name of the model on it.
        tokenizer: encodes the probe.

    Raises:
        ServerError: the server fails.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    greedy = Drawing(_PROBED_TOKENS, 0.0, 1.0, 0, ())
    return [model, engine.write(model, ids, greedy, 0).tokens]


@dataclass
class StudentWriter:
    """A server that writes the student's answers with the student's weights.

    Attributes:
        writer: the server.
        folder: where weights are saved, which the server sees as well.
        every: steps between two handovers.
        written_at: step whose weights the server has; None before the first.
    """

    writer: ServedWriter
    folder: Path
    every: int
    written_at: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether the server needs other weights before it writes in a step."""
        return self.written_at is None or (step != self.written_at and step % self.every == 0)

    def hand_over(self, student: Any, tokenizer: Any) -> None:
        """Save the student's weights, have the server take them in, and check that it has.

        Args:
            student: a causal language model, perhaps with adapters, which are merged in the copy.
            tokenizer: encodes the probe.

        Raises:
            ServerError: the disk or the server fails, or the server still has other weights.
        """
        place, partial = self.folder / "weights", self.folder / "weights.partial"
        try:
            remove(partial)
            student.save_pretrained(partial, state_dict=merged_weights(student))
            remove(place)
            partial.rename(place)
        except OSError as error:
            raise ServerError(
                f"procedure.sync_folder: {self.folder}: {error.strerror or error}; the student's "
                "weights could not be handed over"
            ) from error
        self.writer.engine.client.after_absence = self._again
        self._again()
        self.check(student, tokenizer(PROBE, add_special_tokens=False)["input_ids"])

    def _again(self) -> None:
        """Have the server take in the present weights; after an absence it has its own again."""
        self.writer.engine.take_in(self.folder / "weights")

    def check(self, student: Any, ids: Sequence[int]) -> None:
        """Compare the server's log-probabilities of a row with the student's.

        Args:
            student: the student whose weights the server has taken in.
            ids: the row.

        Raises:
            ServerError: they differ by more than rounding.
        """
        import torch

        writer = self.writer
        log_probs, indices, _ = writer.engine.score(
            writer.model, ids, range(len(ids) - 1), _PROBED, student.config.vocab_size
        )
        training = student.training
        student.eval()
        try:
            with torch.no_grad():
                logits = student(torch.tensor([ids], device=student.device)).logits[0, :-1]
        finally:
            student.train(training)
        own = logits.float().log_softmax(-1).cpu().gather(-1, indices)
        off = float((own - log_probs).abs().max())
        if not off <= _AGREE:
            raise ServerError(
                f"procedure.writer: {writer.engine.client.address} does not have the student's "
                f"weights after taking them in: its log-probabilities differ by {off:.2g}; start "
                "it as 'kdrun served connector --writer' says, with a model of the student's shape"
            )

    def close(self) -> None:
        """Remove the saved weights."""
        self.writer.engine.client.close()
        shutil.rmtree(self.folder / "weights", ignore_errors=True)
        with suppress(OSError):  # another run's folder may have more in it
            self.folder.rmdir()
