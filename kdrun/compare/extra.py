"""Packages that only comparisons need, from the extra ``compare``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kdrun.errors import InputError

_PACKAGES = ("jinja2", "matplotlib", "scipy")


@contextlib.contextmanager
def compare_extra() -> Iterator[None]:
    """Around imports: a missing package of the extra becomes one clear line.

    Raises:
        InputError: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise InputError(
            f"comparisons need {package}, which is not installed: pip install 'kdlosses[compare]'"
        ) from error
