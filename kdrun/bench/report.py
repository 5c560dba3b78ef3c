"""The rows of a benchmark, as a table on the screen and as a CSV file."""

from __future__ import annotations

import csv
import io
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kdlosses import LossSpecError, find_loss, parse_spec
from kdrun.bench.cases import FLOOR, PLAIN
from kdrun.bench.compare import difference, reference_of
from kdrun.bench.measure import Measurement
from kdrun.bench.memory import head_gradient
from kdrun.bench.peers import PEERS
from kdrun.files import write_text

CSV = "bench.csv"
MEASURED, SKIPPED, FAILED = "measured", "skipped", "failed"


@dataclass(frozen=True)
class Row:
    """One measurement; the fields are the columns of the file, where None is empty."""

    tokens: int
    supervised_tokens: int
    vocab: int
    loss: str
    implementation: str
    status: str
    reason: str
    ratio_to_floor: float | None
    ratio_lowest: float | None
    ratio_highest: float | None
    median_s: float | None
    floor_median_s: float | None
    first_call_s: float | None
    head_gradient_mib: float
    peak_mib: float | None
    peak_above_head_gradient_mib: float | None
    peak_ratio_to_plain: float | None
    loss_value: float | None
    hidden_grad_norm: float | None
    weight_grad_norm: float | None
    hidden_grad_error: float | None
    weight_grad_error: float | None
    differs: str
    chunk_size: int | None
    rounds: int
    kd_ratio: float
    student_width: int
    teacher_width: int
    dtype: str
    device: str
    device_name: str
    cpu_model: str
    threads: int | None
    distribution: str
    distribution_version: str
    kdlosses: str
    torch: str
    python: str
    warnings: str


def rows_of(results: Sequence[Measurement]) -> list[Row]:
    """Rows of one loss at one point, or of the floor."""
    reference = reference_of(results)
    plain = next((item for item in results if item.case.implementation == PLAIN), None)
    return [_row(result, reference, plain) for result in results]


def write_csv(rows: Iterable[Row], folder: Path) -> None:
    """Write all rows atomically."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in asdict(row).items()})
    write_text(folder / CSV, stream.getvalue())


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each point of the grid, followed by notes on single rows."""
    for tokens, vocab in dict.fromkeys((row.tokens, row.vocab) for row in rows):
        chosen = [row for row in rows if (row.tokens, row.vocab) == (tokens, vocab)]
        console.print()
        console.print(_heading(chosen))
        compared = any(row.weight_grad_error is not None for row in chosen)
        table = Table(box=None, pad_edge=False)
        table.add_column("loss", overflow="fold")  # wraps on narrow screens
        table.add_column("implementation", no_wrap=True)
        for heading in (
            "time\n/ floor",
            "peak\nMiB",
            "over\ngradient",
            "peak\n/ plain",
            "first\ncall s",
            *(["gradient\nerror"] if compared else []),
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        last = ""
        for row in chosen:
            cells = [*_cells(row), *([_error(row)] if compared else [])]
            table.add_row("" if row.loss == last else escape(row.loss), *cells)
            last = row.loss
        console.print(table)
        for row in chosen:
            for note in _notes(row):
                console.print(f"{escape(f'{row.loss} {row.implementation}'.strip())}: {note}")


def _row(result: Measurement, reference: Measurement | None, plain: Measurement | None) -> Row:
    case, ready = result.case, result.ready
    settings, point = case.settings, case.point
    floor = case.implementation == FLOOR
    measured = result.measured and not result.skipped
    ratios = ([1.0] if floor else result.ratios) if measured else []
    compared = measured and reference is not None and reference is not result
    gradient = head_gradient(case) / 2**20
    peak = result.peak_mib
    plain_peak = None if plain is None else plain.peak_mib
    distribution = _distribution(result)
    return Row(
        tokens=point.tokens,
        supervised_tokens=point.supervised,
        vocab=point.vocab,
        loss=case.loss,
        implementation=case.implementation,
        status=MEASURED if measured else FAILED if result.failed else SKIPPED,
        reason=result.failed or result.skipped or "",
        ratio_to_floor=_median(ratios),
        ratio_lowest=min(ratios, default=None),
        ratio_highest=max(ratios, default=None),
        median_s=_median(result.seconds),
        floor_median_s=_median(result.seconds if floor else result.floor_seconds),
        first_call_s=None if ready is None else ready.first_call_s,
        head_gradient_mib=gradient,
        peak_mib=peak,
        peak_above_head_gradient_mib=None if peak is None else peak - gradient,
        peak_ratio_to_plain=(peak / plain_peak if peak is not None and plain_peak else None),
        loss_value=None if ready is None or floor else ready.loss,
        hidden_grad_norm=None if ready is None or floor else ready.hidden_grad_norm,
        weight_grad_norm=None if ready is None or floor else ready.weight_grad_norm,
        hidden_grad_error=None if result.errors is None else result.errors.hidden,
        weight_grad_error=None if result.errors is None else result.errors.weight,
        differs=(compared and reference is not None and difference(result, reference)) or "",
        chunk_size=None if ready is None else ready.chunk_size,
        rounds=settings.rounds,
        kd_ratio=settings.kd_ratio,
        student_width=settings.student_width,
        teacher_width=settings.teacher_width,
        dtype=settings.dtype,
        device=settings.device,
        device_name=(ready.device if ready is not None else None) or "",
        cpu_model=_cpu_model(),
        threads=settings.threads if ready is None else ready.threads,
        distribution=distribution,
        distribution_version=_version(distribution),
        kdlosses=_version("kdlosses"),
        torch=_version("torch"),
        python=platform.python_version(),
        warnings="; ".join(ready.warnings) if ready is not None else "",
    )


def _heading(rows: Sequence[Row]) -> str:
    row = rows[0]
    times = [item.floor_median_s for item in rows if item.floor_median_s is not None]
    floor = f"; the floor takes {_seconds(statistics.median(times))}" if times else ""
    device = row.device_name or row.cpu_model
    return escape(
        f"{row.tokens} tokens ({row.supervised_tokens} supervised), vocabulary {row.vocab}, widths "
        f"{row.student_width} and {row.teacher_width}, {row.dtype}, {device}{floor}"
    )


def _cells(row: Row) -> list[str]:
    if row.status != MEASURED:
        return [row.implementation, row.status, *[""] * 4]
    name = row.implementation + (" *" if row.differs else "")
    return [
        name,
        _figure(row.ratio_to_floor, 2),
        _figure(row.peak_mib, 0),
        _figure(row.peak_above_head_gradient_mib, 0),
        _figure(row.peak_ratio_to_plain, 2),
        _figure(row.first_call_s, 1),
    ]


def _error(row: Row) -> str:
    """The larger error of the two gradients."""
    if row.hidden_grad_error is None or row.weight_grad_error is None:
        return "-"
    return f"{max(row.hidden_grad_error, row.weight_grad_error):.1e}"


def _notes(row: Row) -> list[str]:
    colour = "red" if row.status == FAILED else "yellow"
    notes = [f"[{colour}]{row.status}[/]: {escape(row.reason)}"] if row.reason else []
    notes += [f"[red]* {escape(row.differs)}[/]"] if row.differs else []
    notes += [escape(row.warnings)] if row.warnings else []
    return notes


def _figure(value: float | None, digits: int) -> str:
    # Adding 0 turns a rounded -0 into 0.
    return "-" if value is None else f"{round(value, digits) + 0:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _distribution(result: Measurement) -> str:
    """The distribution and version of the measured code."""
    name = result.case.implementation
    if name == FLOOR:
        return "torch"
    if name in PEERS:
        return PEERS[name].distribution
    try:
        terms = parse_spec(result.case.loss).terms
        return "+".join(dict.fromkeys(find_loss(term.name).distribution for term in terms))
    except LossSpecError:  # a name registered by two distributions
        return ""


def _version(distribution: str) -> str:
    try:
        return version(distribution) if distribution else ""
    except PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
