"""Makes the page of installed packages that register losses and other parts, from their metadata.

``python docs/packages.py`` prints it; the site (``generated_pages.py``) has it as ``packages.md``.
Nothing is imported: a package is described by what its metadata and entry points say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions

GROUPS = {
    "kdlosses.losses": "losses",
    "kdlosses.weights": "token weights",
    "kdlosses.features": "features",
    "kdrun.procedures": "procedures",
}
"""Groups of entry points, and what their members are called on the page."""

_INTRODUCTION = """\
# Packages

The following installed packages register losses, token weights, features or procedures. The page is
made from their metadata by `docs/packages.py`; whether a loss conforms says
`kdrun losses check NAME`. A package appears here when it is installed where the site is built.

"""


def page(found: Iterable[Distribution] | None = None) -> str:
    """The page, in Markdown.

    Args:
        found: the distributions to look at; by default all that are installed.
    """
    # One that stands earlier on the path hides others of its name, as for an import.
    visible: dict[str, Distribution] = {}
    for distribution in distributions() if found is None else found:
        visible.setdefault(
            re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower(), distribution
        )
    table = ["| package | registers | about | licence |", "|---|---|---|---|"]
    rows = _rows(visible[name] for name in sorted(visible))
    return _INTRODUCTION + "\n".join([*table, *rows]) + "\n"


def _rows(found: Iterable[Distribution]) -> Iterator[str]:
    for distribution in found:
        parts = []
        for group, kind in GROUPS.items():
            names = sorted(entry.name for entry in distribution.entry_points.select(group=group))
            if names:
                parts.append(f"{kind} {', '.join(f'`{name}`' for name in names)}")
        if parts:
            about = distribution.metadata
            licence = about.get("License-Expression") or about.get("License") or ""
            cells = (_linked(distribution), "; ".join(parts), about.get("Summary") or "", licence)
            yield "| " + " | ".join(map(_cell, cells)) + " |"


def _linked(distribution: Distribution) -> str:
    """Name and version, with a link to the project's page if it names one."""
    urls = [url.partition(",") for url in distribution.metadata.get_all("Project-URL") or ()]
    known = {label.strip().lower(): url.strip() for label, _, url in urls}
    given = distribution.metadata.get("Home-page")
    candidates = (known.get("homepage"), known.get("repository"), known.get("source"), given)
    url = next((one for one in candidates if one and one.startswith("https://")), None)
    name = f"{distribution.metadata['Name']} {distribution.version}"
    return f"[{name}]({url})" if url and not set(url) & set(" ()<>") else name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
