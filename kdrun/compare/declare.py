"""What a comparison's folder declares of itself before its first trial: enough to report on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdrun.compare.ledger import COMPARISON, Ledger
from kdrun.compare.plan import (
    Axes,
    Plan,
    default_of,
    find_yardstick,
    merge,
    setting,
    shared_settings,
)
from kdrun.compare.run import Comparison
from kdrun.config import DataConfig
from kdrun.data.prepare import read_rows
from kdrun.data.split import content_hash
from kdrun.errors import InputError


class Declaration(BaseModel):
    """The content of ``comparison.yaml``.

    Attributes:
        axes: of all commands on the folder so far.
        yardstick: name of the primary one.
        difference: the smallest difference of interest on it.
        rows: hash of the training and held-out rows.
        shared: the configuration that all trials share.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    axes: Axes
    yardstick: str
    difference: float
    rows: str
    shared: dict[str, dict[str, Any]]

    @property
    def plan(self) -> Plan:
        """The plan of the whole folder."""
        return Plan(
            self.axes, find_yardstick(self.yardstick), self.difference, setting(self.shared)
        )


def declare(comparison: Comparison, ledger: Ledger) -> Plan:
    """Add a comparison to a folder, or make it the folder's first.

    Returns:
        The plan of the folder, which may hold the trials of earlier commands too.

    Raises:
        InputError: the folder holds a comparison with other shared settings, naming the first one
            that differs.
    """
    plan = comparison.plan
    given = Declaration(
        axes=plan.axes,
        yardstick=plan.yardstick.name,
        difference=plan.difference,
        rows=_hash_rows(comparison.base.data),
        shared=shared_settings(comparison.base),
    )
    with ledger.hold("comparison"):
        found = read_declaration(ledger)
        if found is not None:
            _check_equal(found, given, f"--output {ledger.folder}")
            given = given.model_copy(update={"axes": merge(found.axes, given.axes)})
        if given != found:
            ledger.declare(given.model_dump(mode="json"))
    return given.plan


def read_declaration(ledger: Ledger) -> Declaration | None:
    """What a folder declares; None for a new one.

    Raises:
        InputError: the file was edited into something else.
    """
    settings = ledger.settings()
    if settings is None:
        return None
    try:
        found = Declaration.model_validate(settings)
        found.axes.check()
        find_yardstick(found.yardstick)
    except (ValidationError, InputError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise InputError(
            f"{ledger.folder / COMPARISON}: not the settings of a comparison ({reason}); was it "
            "edited?"
        ) from error
    return found


def _check_equal(found: Declaration, given: Declaration, place: str) -> None:
    for section, values in given.shared.items():
        for key, value in values.items():
            # A key that the folder lacks is younger than the folder.
            before = found.shared.get(section, {}).get(key, default_of(section, key))
            if before != value:
                raise InputError(
                    f"{place} holds a comparison with {section}.{key}={before!r}, now {value!r}; "
                    "name another folder, or set it as it was"
                )
    for name in ("yardstick", "difference"):
        before, now = getattr(found, name), getattr(given, name)
        if before != now:
            raise InputError(
                f"{place} was declared with {name} {before!r}, now {now!r}: both are settled "
                "before the first trial; name another folder"
            )
    if found.rows != given.rows:
        raise InputError(
            f"{place}: data.train={given.shared['data']['train']} or the held-out rows were edited "
            "since the first trial; restore them, or name another folder"
        )


def _hash_rows(data: DataConfig) -> str:
    """A hash of all rows that trials train and are measured on, whatever their files are called."""
    every = read_rows(data.model_copy(update={"part": "all"}))
    parts: Mapping[str, Any] = {"train": every.train, "held_out": every.held_out}
    if data.test is not None:
        test = read_rows(data.model_copy(update={"part": "test"}))
        parts = {**parts, "test": test.held_out}
    content = hashlib.sha256()
    for name, rows in parts.items():
        content.update(name.encode())
        for row in rows:
            content.update(content_hash(row).encode())
    return content.hexdigest()
