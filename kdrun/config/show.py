"""The default configuration as YAML, each key with its description as a comment."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from kdrun.config.load import load_config
from kdrun.config.sections import RunConfig

_WIDTH = 100
_HEAD = (
    "All keys of a run, with the values for the built-in pair, which a run without options uses. "
    "Keep the keys that you change and delete the rest; 'kdrun --config FILE' reads the file."
)


def default_yaml() -> str:
    """The output of ``kdrun config``, which ``kdrun --config`` accepts."""
    return "\n".join(_lines(load_config())) + "\n"


def _lines(config: RunConfig) -> Iterator[str]:
    yield from _comment(_HEAD, "")
    for name, field in type(config).model_fields.items():
        section: BaseModel = getattr(config, name)
        yield ""
        yield from _comment(str(type(section).__doc__).split("\n")[0], "")
        yield f"{name}:" if type(section).model_fields else f"{name}: {{}}"
        elsewhere = field.get_default(call_default_factory=True)
        values = section.model_dump(mode="json")
        for key, inner in type(section).model_fields.items():
            other = elsewhere.model_dump(mode="json")[key]
            yield from _comment(_describe(inner, values[key], other), "  ")
            yield f"  {_dump(key)}: {_dump(values[key])}"  # quoted if YAML would misread it


def _describe(field: FieldInfo, value: Any, elsewhere: Any) -> str:
    parts = [str(field.description)]
    if choices := _choices(field.annotation):
        parts.append(f"one of {', '.join(choices)}")
    if value != elsewhere and elsewhere is not None:
        parts.append(f"{_dump(elsewhere)} for other pairs")
    return "; ".join(parts)


def _dump(value: Any) -> str:
    """A value on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).splitlines()[0]


def _choices(annotation: Any) -> list[str]:
    """The allowed values of a key with a fixed set of values; else an empty list."""
    if get_origin(annotation) is Literal:
        return list(map(str, get_args(annotation)))
    others = [part for part in get_args(annotation) if part is not type(None)]
    # What null means is part of the description.
    return _choices(others[0]) if len(others) == 1 else []


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix)
