"""The exceptions that end a run with one clear line and no traceback."""


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
    """The user stopped the run, and it has been saved: exit code 130."""
