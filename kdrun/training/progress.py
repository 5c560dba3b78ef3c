"""Progress of a run in training: the bar, ``metrics.jsonl`` and the token rate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from kdrun.evaluation.yardsticks import SHOWN
from kdrun.files import write_text

if TYPE_CHECKING:
    from kdrun.training.trainer import DistillTrainer

_LINES_WITHOUT_TERMINAL = 10


class ShowProgress(TrainerCallback):
    """Show a bar with losses and rate on a terminal, and a few plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._every = 1
        self._shown = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self._every = max(1, state.max_steps // _LINES_WITHOUT_TERMINAL)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "train", total=state.max_steps, completed=state.global_step, shown=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, shown=self._shown)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Show the values of a log line."""
        if "loss" in logs:
            kd = "" if logs.get("kd_loss") is None else f"  KD {logs['kd_loss']:.4f}"
            rate = logs.get("supervised_tokens_per_second", 0.0)
            self._shown = (
                f"loss {logs['loss']:.4f}  class {logs['class_loss']:.4f}{kd}  {rate:.0f} tokens/s"
            )
            last = state.global_step >= state.max_steps
            if self._progress is None and (state.global_step % self._every == 0 or last):
                self._console.print(f"step {state.global_step}/{state.max_steps}  {self._shown}")
        elif "eval_ce" in logs:
            shown = [
                f"{yardstick.title} {value:.4f}"
                for yardstick in SHOWN
                if (value := logs.get(f"eval_{yardstick.name}")) is not None
            ]
            self._console.print(f"step {state.global_step}  held out: {', '.join(shown)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar, also after a failure."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class MetricsFile:
    """``metrics.jsonl``: one object per line, each flushed when written.

    Damaged lines are dropped, and the damaged file is kept next to it, so that old metrics never
    stop a run.

    Args:
        path: the file.
        from_step: lines of later steps are dropped, since a resumed run writes them again.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        self._path = path
        lines = self._lines()
        read = [(line, _step_of(line)) for line in lines]
        if any(step is None for _, step in read[:-1]):  # a killed run may leave half a last line
            path.replace(path.with_name(f"{path.name}.damaged"))
        kept = [line for line, step in read if step is not None and step <= from_step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def _lines(self) -> list[str]:
        if not self._path.is_file():
            return []
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [line for line in lines if line.strip()]

    def append(self, values: dict[str, Any]) -> None:
        """Add a line."""
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(values, ensure_ascii=False) + "\n")


def _step_of(line: str) -> int | None:
    """Return the step of a line; None if it is damaged."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) else None


class WriteMetrics(TrainerCallback):
    """Write each log line to ``metrics.jsonl``, on the main process.

    Args:
        begin: starts the records; called once, when a checkpoint has been read or the first line
            is logged, so that a run refused before leaves its folder unchanged.
    """

    def __init__(self, begin: Callable[[], MetricsFile]) -> None:
        self._begin = begin
        self._file: MetricsFile | None = None

    def open(self) -> MetricsFile:
        """The file, after its records were started."""
        if self._file is None:
            self._file = self._begin()
        return self._file

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the records; the Trainer has read the checkpoint by now."""
        self.open()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write a line, except for the Trainer's closing summary."""
        wanted = {"loss", "eval_ce", "skipped_steps"}
        if state.is_world_process_zero and not wanted.isdisjoint(logs):
            line = {"step": state.global_step, **logs}
            line["lr"] = line.pop("learning_rate", None)
            self.open().append({key: value for key, value in line.items() if value is not None})


class TokenRate(TrainerCallback):
    """Add ``supervised_tokens_per_second`` to the log, for steps without evaluation."""

    def __init__(self, trainer: DistillTrainer, clock: Any) -> None:
        self._trainer = trainer
        self._clock = clock
        self._started = 0.0
        self._first_tokens = 0
        self.seconds = 0.0
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._started = self._clock()
        self._first_tokens = self._trainer.sums.supervised_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds += self._clock() - self._started
        self.tokens += self._trainer.sums.supervised_tokens - self._first_tokens

    @property
    def rate(self) -> float:
        """Supervised tokens per second of this process, over all steps so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Add the rate to a training log line."""
        if "loss" in logs:
            logs["supervised_tokens_per_second"] = round(self.rate * args.world_size, 1)


class StopOnRequest(TrainerCallback):
    """End training after the current step, with a checkpoint, when requested.

    All processes stop after the same step, whichever received the request.

    Args:
        trainer: the trainer to stop.

    Attributes:
        signum: number of the signal that requested it; None before that.
    """

    def __init__(self, trainer: DistillTrainer) -> None:
        self._trainer = trainer
        self.signum: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the trainer save and stop, without another evaluation."""
        self._agree()
        if self.signum is not None:
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def _agree(self) -> None:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes > 1:
            mine = torch.tensor([self.signum or 0], device=accelerator.device)
            highest = int(accelerator.gather(mine).max())
            self.signum = highest or None
