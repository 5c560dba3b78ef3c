"""What a run shows while it trains, and the table at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from kdrun.evaluation.yardsticks import YARDSTICKS

if TYPE_CHECKING:
    from kdrun.runs import MetricsFile

_LINES_WITHOUT_TERMINAL = 10


def make_console() -> Console:
    """The console of a command: standard error, so that output can be piped."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


class ShowProgress(TrainerCallback):
    """A bar with the losses and the rate on a terminal, a few plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task: Any = None
        self._every = 1
        self._shown = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar."""
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
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, shown=self._shown)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Shows the figures of a line of the log."""
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
                for yardstick in YARDSTICKS
                if (value := logs.get(f"eval_{yardstick.name}")) is not None
            ]
            self._console.print(f"step {state.global_step}  held out: {', '.join(shown)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the bar."""
        self.close()

    def close(self) -> None:
        """Ends the bar, also after a failure."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class WriteMetrics(TrainerCallback):
    """Writes each line of the log to ``metrics.jsonl``, on the main process."""

    def __init__(self, file: MetricsFile) -> None:
        self._file = file

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Writes a line; the trainer's closing summary of itself is left out."""
        wanted = {"loss", "eval_ce", "skipped_steps"}
        if state.is_world_process_zero and not wanted.isdisjoint(logs):
            line = {"step": state.global_step, **logs}
            line["lr"] = line.pop("learning_rate", None)
            self._file.append({key: value for key, value in line.items() if value is not None})


def before_after(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """The measures on held-out rows before and after training."""
    table = Table(title="held-out rows", title_justify="left")
    for heading in ("measure", "before", "after", ""):
        table.add_column(heading, justify="right" if heading in ("before", "after") else "left")
    for yardstick in YARDSTICKS:
        key = f"eval_{yardstick.name}"
        values = [_figure(measures.get(key)) for measures in (before, after)]
        if key in after:
            table.add_row(yardstick.title, *values, yardstick.explained)
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
