"""The exceptions that end a run with one clear line and no traceback."""

import re
import signal

_LOGIN = re.compile(r"(//|\w{2,}:/)[^/\s'\"]*@")  # paths have lost the second slash


class InputError(Exception):
    """The user's input is wrong.

    The message is one line that names the file, row, field or token at fault and says how to
    fix it. The command line prints it and exits with code 2.
    """


class TrainingError(Exception):
    """Training failed on valid input, such as a loss that became NaN: exit code 1."""


class UnwritableError(OSError):
    """A run's folder is no longer writable, for example because the disk is full: exit code 1."""


class Interrupted(Exception):  # noqa: N818 - not an error: the run was saved and can be resumed
    """A signal stopped the run, which was saved: exit code 128 plus the signal's number.

    Args:
        message: one line that says how to continue.
        signum: number of the signal; by default Ctrl-C's, which gives 130.
    """

    def __init__(self, message: str, signum: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signum = signum


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the process to end, such as a scheduler's SIGTERM.

    Args:
        signum: number of the signal.
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
    """Return the signal number of an exception; Ctrl-C's for a plain one."""
    return int(getattr(error, "signum", signal.SIGINT))


def without_passwords(text: str) -> str:
    """Return a message with the logins of its URLs replaced, as in ``https://***@host``."""
    return _LOGIN.sub(r"\1***@", text)
