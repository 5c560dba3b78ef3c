"""Packages of the extra ``compare``, which only comparisons need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

from kdrun.errors import InputError

_PACKAGES = ("jinja2", "matplotlib", "scipy")


@contextlib.contextmanager
def compare_extra() -> Iterator[None]:
    """Context for imports that turns a missing package of the extra into a one-line error.

    Raises:
        InputError: a package of the extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        raise _missing(package) from error


def check_extra() -> None:
    """Check that the extra is installed, without importing it.

    Raises:
        InputError: a package of the extra is not installed.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise _missing(package)


def _missing(package: str) -> InputError:
    return InputError(
        f"comparisons need {package}, which is not installed: pip install 'kdlosses[compare]'"
    )
