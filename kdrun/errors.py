"""The one exception for wrong input: a single clear line, exit code 2, no traceback."""


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one line that names the file, row, field or token at fault and says how to
    mend it. The command line prints it and exits with code 2.
    """
