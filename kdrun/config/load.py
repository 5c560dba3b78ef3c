"""Build a configuration from its sources and check it.

Later sources win: the schema's defaults, the built-in pair's defaults, a YAML file, then
``--set section.key=value`` and the flags in the order of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kdrun.builtin import DEFAULTS
from kdrun.config.base import BUILT_IN
from kdrun.config.data_section import Sources
from kdrun.config.sections import KD_RATIO, SHORT_NAMES, RunConfig
from kdrun.config.trainer_keys import type_of
from kdrun.errors import InputError

TRAINER = "trainer"
_NULL = ("", "null")
_NONE = ("model.teacher", "procedure.spec", "features.spec", "token_weight.spec")
"""Keys that the word none unsets, since no teacher, procedure or feature loss has that name."""


def load_config(file: Path | None = None, overrides: Sequence[tuple[str, Any]] = ()) -> RunConfig:
    """Build the configuration of a run.

    Args:
        file: YAML with sections and keys.
        overrides: ``("section.key", value)``; :func:`parse_value` reads values that are text.

    Raises:
        InputError: unreadable YAML, an unknown key (with a suggestion), or a wrong value.
    """
    given = _spell_on(_read_yaml(file)) if file is not None else {}
    for key, value in overrides:
        _put(given, key, value)
    _check_keys(given, origin=str(file) if file is not None else "configuration")
    return validate(complete_pair(given))


def _spell_on(values: dict[str, Any]) -> dict[str, Any]:
    """Restore the key ``on`` of the token weight, which YAML 1.1 reads as true."""
    section = values.get("token_weight")
    if not isinstance(section, Mapping) or True not in section:
        return values
    spelled = {"on" if key is True else key: value for key, value in section.items()}
    return {**values, "token_weight": spelled}


def validate(values: Mapping[str, Any]) -> RunConfig:
    """Check values against the schema.

    Raises:
        InputError: a wrong value, naming its key.
    """
    try:
        return RunConfig.model_validate(spread_short_names(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        # Messages repeat values, which may contain line breaks.
        reason = " ".join(first["msg"].removeprefix("Value error, ").split())
        raise InputError(f"{key}={first['input']!r}: {reason}") from error


def complete_pair(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the teacher, and the default settings of the built-in pair and of a procedure.

    Raises:
        InputError: a student without a teacher or data, a teacher without a student, or an unknown
            procedure.
    """
    given = _with_procedure(given)
    model = dict(_section(given, "model"))
    data = _section(given, "data")
    loss = _section(given, "loss")
    # A schedule of the ratio is never 0 at every step; its bounds are checked later.
    ratio = 1.0 if KD_RATIO in _section(loss, "schedules") else loss.get(KD_RATIO, 0.5)
    student = model.get("student")
    cached = model.get("teacher_cache") is not None
    if student in (None, BUILT_IN):
        if str(model.get("teacher")).partition(":")[0] == "self":
            raise InputError(
                f"--teacher {model['teacher']} was given without --student; pass the student that "
                "teaches itself"
            )
        if model.get("teacher") not in (None, BUILT_IN):
            raise InputError(
                f"--teacher {model['teacher']} was given without --student; "
                "'kdrun init-student' creates one from the teacher's layers"
            )
        if "teacher" not in model:
            model["teacher"] = None if cached else BUILT_IN
        elif model["teacher"] is None and ratio != 0 and not cached:
            raise InputError("--teacher none requires --kd-ratio 0: there is no teacher to distil")
    else:
        if model.get("teacher") is None and ratio != 0 and not cached:
            raise InputError(
                f"--student {student} was given without --teacher; pass one (or --teacher-cache), "
                "or --kd-ratio 0 to train on the data alone"
            )
        if "train" not in data and not data.get("sources"):
            raise InputError(
                f"--student {student} was given without --data; pass a file, or 'builtin' for the "
                "built-in text"
            )
    result = {**given, "model": model}
    if student in (None, BUILT_IN):
        for section, defaults in DEFAULTS.items():
            result[section] = {**defaults, **_section(given, section)}
        training = _section(given, "training")
        if "num_epochs" in training and "max_steps" not in training:
            del result["training"]["max_steps"]  # it would override the user's value
    return result


def spread_short_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace short names in sections by the keys that they stand for."""
    result = dict(values)
    for short, keys in SHORT_NAMES.items():
        section, _, name = short.partition(".")
        content = _section(result, section)
        if name in content:
            rest = {key: value for key, value in content.items() if key != name}
            others = {key.partition(".")[2]: content[name] for key in keys}
            result[section] = {**others, **rest}
    return result


def _with_procedure(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the defaults of a procedure for keys that the user did not set."""
    spec = _section(given, "procedure").get("spec")
    if not isinstance(spec, str):
        return given
    from kdrun.procedures.registry import get_procedure

    result = dict(given)
    for key, value in get_procedure(spec).defaults.items():
        section, _, name = key.partition(".")
        result[section] = {name: value, **_section(result, section)}
    return result


def _section(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name)
    return value if isinstance(value, Mapping) else {}


def stated_keys(file: Path | None) -> set[str]:
    """The keys, ``section.key``, that a file sets to any value.

    Raises:
        InputError: unreadable YAML.
    """
    sections = {} if file is None else stated_values(file)
    return {f"{section}.{key}" for section, content in sections.items() for key in content}


def stated_values(file: Path) -> dict[str, Mapping[str, Any]]:
    """The sections of a file, with the keys and values that it sets.

    Raises:
        InputError: unreadable YAML.
    """
    sections = spread_short_names(_read_yaml(file))
    return {name: _section(sections, name) for name in sections}


def every_key() -> list[str]:
    """All keys of a configuration, ``section.key``."""
    return [
        f"{name}.{key}" for name in RunConfig.model_fields for key in _model_of(name).model_fields
    ]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; pass an existing YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not valid YAML: {reason}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError(f"{file}: expected sections such as 'loss:', got {type(loaded).__name__}")
    return loaded


def parse_value(key: str, text: str) -> Any:
    """Parse the command-line value of a key, given by ``--set`` or by its flag.

    Text keys take the value literally: a folder may be called ``1e3``, and a regular expression may
    contain ``#`` and ``:``. If the key may be null, ``null`` and the empty string set it to null,
    and so does ``none`` for a teacher, a procedure, features and a token weight. Every other value
    is parsed as YAML, except that plain exponents (``1e-3``) are numbers.

    Args:
        key: ``section.key``.
        text: the value as text.

    Raises:
        InputError: an unknown key, or invalid YAML.
    """
    annotation = _field(key).annotation
    if annotation == Sources:
        return text
    if annotation in (str | None, Sources | None):
        return None if text in _NULL or (text == "none" and key in _NONE) else text
    if annotation is str:
        return text
    if "e" in text.lower():
        with suppress(ValueError):
            return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # an impossible date raises ValueError
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(
            f"{key}={text!r}: not valid YAML ({reason}); check its brackets and quotes"
        ) from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    _field(key)
    for whole in SHORT_NAMES.get(key, (key,)):
        section, _, name = whole.partition(".")
        target = values.get(section)
        values[section] = {**target, name: value} if isinstance(target, dict) else {name: value}


def _field(key: str) -> FieldInfo:
    """The schema field of a key from ``--set`` or a flag."""
    section, dot, name = SHORT_NAMES.get(key, (key,))[0].partition(".")
    if not dot or not name:
        raise InputError(f"--set {key}: expected section.key=value, such as optimizer.lr=1e-3")
    _check_key(section, name, "--set")
    if section == TRAINER:
        return FieldInfo(annotation=type_of(name))
    fields: dict[str, FieldInfo] = _model_of(section).model_fields
    return fields[name]


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    for section, content in values.items():
        _check_is_word(section, origin)
        _check_key(section, None, origin)
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise InputError(f"{origin}: section {section!r} must contain keys, got {content!r}")
        for name in content:
            _check_is_word(name, origin, f"{section}: ")
            _check_key(section, name, origin)


def _check_is_word(name: Any, origin: str, place: str = "") -> None:
    if not isinstance(name, str):
        raise InputError(
            f"{origin}: {place}YAML reads a key here as {name!r}, not as a word (it reads on, off, "
            "yes and no as true and false); 'kdrun config' prints all sections and keys"
        )


def _check_key(section: str, name: str | None, origin: str) -> None:
    sections = list(RunConfig.model_fields)
    if section not in sections:
        raise InputError(f"{origin}: unknown section {section!r}{_hint(section, sections)}")
    if section == TRAINER:
        if name is not None:
            type_of(name)
        return
    keys = list(_model_of(section).model_fields)
    if name is not None and name not in keys and f"{section}.{name}" not in SHORT_NAMES:
        hint = _hint(name, keys, f"{section}.") or _hint(f"{section}.{name}", every_key())
        raise InputError(f"{origin}: unknown key '{section}.{name}'{hint}")


def _model_of(section: str) -> type[BaseModel]:
    model = RunConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _hint(word: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean '{prefix}{close[0]}'?" if close else f"; known: {', '.join(known)}"
