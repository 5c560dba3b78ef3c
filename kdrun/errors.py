"""The exceptions that end a run with one clear line and no traceback."""

import signal


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, row, field or token at fault and says how to
    mend it. The command line prints it and exits with code 2.
    """


class TrainingError(Exception):
    """Training failed on input that was right, such as a loss that became NaN: exit code 1."""


class UnwritableError(OSError):
    """A run's folder cannot be written any more, such as on a full disk: exit code 1."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was saved and can go on
    """A signal stopped the run, which has been saved: exit code 128 and the signal's number.

    Args:
        message: one line that says how to go on.
        signum: of the signal; by default Ctrl-C's, which gives 130.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the process to end, such as a scheduler's SIGTERM.

    Args:
        signum: of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
"""Signals that stop a run at the end of its step: Ctrl-C, schedulers and closed terminals."""


def signal_of(error: BaseException) -> int:
    """The number of the signal that an exception stands for; of a plain one Ctrl-C's."""
    return int(getattr(error, "signum", signal.SIGINT))
