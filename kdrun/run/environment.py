"""What a result depends on besides its configuration: packages and the state of the sources."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from typing import Any

_PACKAGES = ("kdlosses", "torch", "transformers", "accelerate")


def versions(*further: str) -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on.

    Args:
        *further: packages besides those that every result depends on.
    """
    packages = (*_PACKAGES, *further)
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the working directory; None outside a repository."""

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, encoding="utf-8", check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "clean": ask("status", "--porcelain") == ""}
