"""The entry point of the command line, and its exit codes. Heavy modules are imported on use."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any

import click

from kdrun.cli.bench import bench
from kdrun.cli.cache import cache_teacher
from kdrun.cli.compare import compare_losses, report
from kdrun.cli.config import config_command
from kdrun.cli.data import data
from kdrun.cli.evaluate import evaluate
from kdrun.cli.features import features
from kdrun.cli.losses import losses
from kdrun.cli.models import generate, init_student
from kdrun.cli.procedures import procedures
from kdrun.cli.served import served
from kdrun.cli.train import cli as cli
from kdrun.cli.weights import weights
from kdrun.errors import (
    STOPPING,
    InputError,
    Interrupted,
    Stopped,
    TrainingError,
    signal_of,
    without_passwords,
)

for command in (
    losses,
    features,
    procedures,
    weights,
    data,
    bench,
    compare_losses,
    report,
    evaluate,
    config_command,
    generate,
    init_student,
    cache_teacher,
    served,
):
    cli.add_command(command)


def _stop(signum: int, frame: Any) -> None:
    raise Stopped(signum)


def _tell(line: str) -> None:
    click.echo(f"kdrun: {without_passwords(line)}", err=True)


def main() -> None:
    """Run the command line and exit with the documented codes."""
    from kdlosses import BrokenLossError, LossSpecError
    from kdrun.quiet import quiet_environment

    quiet_environment()
    for signum in STOPPING:
        # Python itself raises KeyboardInterrupt; nohup ignores SIGHUP, which must stay ignored.
        if signum != signal.SIGINT and signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _stop)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        click.echo(without_passwords(shown.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except (InputError, LossSpecError, BrokenLossError) as error:
        _tell(str(error))
        sys.exit(2)
    except TrainingError as error:
        _tell(str(error))
        sys.exit(1)
    except Interrupted as error:
        _tell(str(error))
        sys.exit(128 + error.signum)
    except (click.Abort, KeyboardInterrupt) as error:
        stopped = error.__cause__ if isinstance(error, click.Abort) else error
        said = str(stopped) if isinstance(stopped, Stopped) else "interrupted"
        _tell(said)
        sys.exit(128 + (signal.SIGINT if stopped is None else signal_of(stopped)))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _tell(f"{place}{error.strerror or error}")
        sys.exit(1)
