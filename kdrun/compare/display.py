"""The progress display of a comparison."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from kdrun.compare.labels import label_arms
from kdrun.compare.record import Arm, Record, Trial
from kdrun.evaluation.yardsticks import Yardstick

if TYPE_CHECKING:
    from rich.console import Console

_SHORT = {"diverged": "[red]diverged[/red]", "failed": "[red]failed[/red]", "done": "done"}


class Display:
    """A live table on a terminal; otherwise one line per trial.

    Args:
        console: the console to print to.
        yardstick: the primary yardstick, whose mean is shown.
    """

    def __init__(self, console: Console, yardstick: Yardstick) -> None:
        self._console = console
        self._yardstick = yardstick
        self._live: Live | None = None
        self._seen: set[str] = set()
        self._running: tuple[Trial, float] | None = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self, planned: Sequence[Trial], records: Sequence[Record], running: Trial | None
    ) -> None:
        """Show the progress of the comparison.

        Args:
            planned: all trials planned so far.
            records: records of finished trials.
            running: the trial that starts now, if any.
        """
        self._running = (running, time.monotonic()) if running is not None else None
        if self._live is not None:
            self._live.update(self._table(planned, records), refresh=True)
            return
        labels = label_arms(trial.arm for trial in planned)
        for record in records:
            if record.id not in self._seen:
                self._seen.add(record.id)
                self._console.print(self._ended(record, labels), markup=False)
        if running is not None:
            count = f"{len(records) + 1}/{len(planned)}"
            self._console.print(
                f"[{count}] {labels[running.arm]}, seed {running.seed}, {running.stage}: "
                f"started; {self._left(planned, records)}",
                markup=False,
            )

    def _ended(self, record: Record, labels: Mapping[Arm, str]) -> str:
        name = f"{labels[record.trial.arm]}, seed {record.trial.seed}"
        if record.status != "done":
            return f"  {name}: {record.status}: {record.reason}"
        value = record.measures.get(self._yardstick.name)
        shown = "" if value is None else f", {self._yardstick.title} {value:.4f}"
        return f"  {name}: done in {record.seconds:.0f} s{shown}"

    def _left(self, planned: Sequence[Trial], records: Sequence[Record]) -> str:
        times = [record.seconds for record in records]
        if not times:
            return f"{len(planned)} trials"
        left = (len(planned) - len(records)) * sum(times) / len(times)
        return f"about {left / 60:.0f} min left"

    def _table(self, planned: Sequence[Trial], records: Sequence[Record]) -> Table:
        table = Table(
            title=f"{len(records)} of {len(planned)} trials, {self._left(planned, records)}",
            title_justify="left",
        )
        for heading in ("arm", "stage", "done", "running", "queued", self._yardstick.title):
            table.add_column(heading, justify="left" if heading in ("arm", "stage") else "right")
        labels = label_arms(trial.arm for trial in planned)
        for arm, stage in dict.fromkeys((trial.arm, trial.stage) for trial in planned):
            ended = [r for r in records if (r.trial.arm, r.trial.stage) == (arm, stage)]
            count = sum((trial.arm, trial.stage) == (arm, stage) for trial in planned)
            now = self._running is not None and (
                (self._running[0].arm, self._running[0].stage) == (arm, stage)
            )
            values = [
                value
                for record in ended
                if (value := record.measures.get(self._yardstick.name)) is not None
            ]
            bad = [_SHORT[record.status] for record in ended if record.status != "done"]
            table.add_row(
                escape(labels[arm]),
                stage,
                " ".join([str(len(ended) - len(bad)), *sorted(set(bad))]),
                "1" if now else "",
                str(count - len(ended) - now),
                f"{sum(values) / len(values):.4f}" if values else "",
            )
        return table
