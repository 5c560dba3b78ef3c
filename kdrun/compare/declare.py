"""The declaration of a comparison, written before its first trial and sufficient for a report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdrun.cache.choose import settle_date
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
from kdrun.compare.run import Comparison, check_loss_files
from kdrun.config.base import BUILT_IN
from kdrun.config.data_section import DataConfig
from kdrun.data.hashes import content_hash
from kdrun.data.prepare import read_rows
from kdrun.errors import InputError
from kdrun.losses.build import files_of
from kdrun.models.pairs import find_pair
from kdrun.run.precision import settle_precision


class Declaration(BaseModel):
    """The content of ``comparison.yaml``.

    Attributes:
        axes: the axes of all commands on the folder so far.
        yardstick: name of the primary yardstick.
        difference: the smallest difference of interest on it.
        rows: hash of the training and held-out rows.
        shared: the configuration that all trials share.
        models: fingerprints of teachers and students, by name; empty in folders of earlier
            versions.
        loss_files: SHA-256 of the files of losses that are not registered, by path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    axes: Axes
    yardstick: str
    difference: float
    rows: str
    shared: dict[str, dict[str, Any]]
    models: dict[str, str] = {}
    loss_files: dict[str, str] = {}

    @property
    def plan(self) -> Plan:
        """The plan of the whole folder."""
        return Plan(
            self.axes,
            find_yardstick(self.yardstick),
            self.difference,
            setting(self.shared),
            self.shared.get("data", {}).get("test") is not None,
        )


def settle_day(comparison: Comparison, ledger: Ledger) -> Comparison:
    """Fix the date for all trials, if the chat template includes the date.

    Args:
        comparison: the comparison, which may set the date.
        ledger: the folder; a comparison that began on another day keeps its date.
    """
    base = comparison.base
    if base.data.date is not None:
        return comparison
    found = read_declaration(ledger)
    if found is not None:
        day = found.shared.get("data", {}).get("date")
    else:
        model = base.model.model_copy(update={"student": comparison.plan.axes.students[0]})
        tokenizer = find_pair(model).tokenizer
        day = settle_date(base.data, base.model.teacher_cache, tokenizer).date
    base = base.model_copy(update={"data": base.data.model_copy(update={"date": day})})
    plan = replace(comparison.plan, setting=setting(shared_settings(base)))
    return replace(comparison, base=base, plan=plan)


def declare(comparison: Comparison, ledger: Ledger) -> Plan:
    """Add a comparison to a folder, or declare the first one.

    Returns:
        The plan of the folder, which may include the trials of earlier commands.

    Raises:
        InputError: the folder contains a comparison with other shared settings (the message names
            the first difference), or with models that were changed since.
    """
    plan = comparison.plan
    given = Declaration(
        axes=plan.axes,
        yardstick=plan.yardstick.name,
        difference=plan.difference,
        rows=_hash_rows(comparison.base.data),
        shared=shared_settings(comparison.base),
    )
    place = f"--output {ledger.folder}"
    with ledger.hold("comparison"):
        found = read_declaration(ledger)
        before = {} if found is None else found.models
        files = {file: now for loss in plan.axes.losses for file, now in files_of(loss).items()}
        if found is not None:
            _check_equal(found, given, place)
            check_loss_files(found.loss_files, files, place)
            files = {**found.loss_files, **files}
            given = given.model_copy(update={"axes": merge(found.axes, given.axes)})
        models = print_models(comparison)
        _check_models(before, models, place)
        given = given.model_copy(update={"models": {**before, **models}, "loss_files": files})
        if given != found:
            ledger.declare(given.model_dump(mode="json"))
    return given.plan


def read_declaration(ledger: Ledger) -> Declaration | None:
    """Read the declaration of a folder; None for a new folder.

    Raises:
        InputError: the file was edited and is not valid.
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
            f"{ledger.folder / COMPARISON}: not the settings of a comparison ({reason}); was the "
            "file edited?"
        ) from error
    return found


def _check_equal(found: Declaration, given: Declaration, place: str) -> None:
    for section, values in given.shared.items():
        for key, value in values.items():
            # A key missing from the folder was added in a later version.
            before = found.shared.get(section, {}).get(key, default_of(section, key))
            if before != value:
                raise InputError(
                    f"{place} contains a comparison with {section}.{key}={before!r}, now "
                    f"{value!r}; choose another folder, or restore the value"
                )
    for name in ("yardstick", "difference"):
        before, now = getattr(found, name), getattr(given, name)
        if before != now:
            raise InputError(
                f"{place} was declared with {name} {before!r}, now {now!r}: both are fixed "
                "before the first trial; choose another folder"
            )
    if found.rows != given.rows:
        raise InputError(
            f"{place}: data.train={given.shared['data']['train']} or the held-out rows were edited "
            "after the first trial; restore them, or choose another folder"
        )


def _check_models(before: Mapping[str, str], now: Mapping[str, str], place: str) -> None:
    for name, found in now.items():
        if before.get(name, found) != found:
            raise InputError(
                f"{place}: the model {name} was changed after the first trial; restore it, or "
                "choose another folder"
            )


def print_models(comparison: Comparison) -> dict[str, str]:
    """Fingerprints of weights, configuration and tokenizer of all teachers and students.

    A student initialised from a seed has no weights yet and gets no fingerprint.

    Raises:
        InputError: a model cannot be loaded.
    """
    from kdrun.cache.fingerprint import print_teacher, print_tokenizer
    from kdrun.models.load import load_model
    from kdrun.models.pairs import locate_pair
    from kdrun.models.tokenizers import load_tokenizer

    model, axes = settle_precision(comparison.base).model, comparison.plan.axes
    sources, types = {}, {}
    for teacher, student in product(axes.teachers, axes.students):
        named = model.model_copy(update={"teacher": teacher, "student": student})
        sources[teacher], of_student = locate_pair(named)
        types[teacher] = model.teacher_type
        if student != BUILT_IN:
            sources[student], types[student] = of_student, model.student_type
    found = {}
    for name, source in sources.items():
        assert source is not None, "a comparison has a teacher"
        weights = print_teacher(load_model(source, types[name], model.trust_remote_code))
        tokenizer = print_tokenizer(
            load_tokenizer(source, trust_remote_code=model.trust_remote_code)
        )
        content = weights.model_dump_json() + tokenizer.model_dump_json()
        found[name] = hashlib.sha256(content.encode()).hexdigest()
    return found


def _hash_rows(data: DataConfig) -> str:
    """A hash of the content of all rows for training and evaluation, independent of file names."""
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
