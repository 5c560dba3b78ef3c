"""Groups of entry points: named classes of installed distributions, imported on first use.

Built-in members and plugins are registered in the same way; the class of a file that is not
installed is named ``FILE.py:CLASS`` (:mod:`kdlosses.loss_file`). Listing only reads metadata; a
plugin that cannot be imported does not affect others.
"""

import difflib
import inspect
import os
import re
import traceback
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from kdlosses.loss_file import (
    DEBUG_VARIABLE,
    check_class,
    hash_file,
    load_class,
    spec_errors,
    split_name,
)

_BUILT_IN = "kdlosses"

R = TypeVar("R", bound="PluginRef")


@dataclass(frozen=True)
class PluginRef:
    """A registered class, not yet imported.

    Attributes:
        name: the name on the command line.
        distribution: the installed distribution that registers it.
        module: ``package.module:Class``.
    """

    name: str
    distribution: str
    module: str


@dataclass(frozen=True)
class PluginGroup(Generic[R]):
    """One group of entry points.

    Attributes:
        group: its name in ``[project.entry-points]``.
        kind: name of a member in messages, such as "loss".
        listing: the command that lists the members.
        ref: the class of references to members.
        wrong: exception for errors of the user or a plugin's author.
        broken: exception for members that cannot be imported.
        elsewhere: names in other tools, mapped to the name here; only for suggestions.
    """

    group: str
    kind: str
    listing: str
    ref: type[R]
    wrong: type[Exception]
    broken: type[Exception]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def available(self) -> tuple[R, ...]:
        """All members by name, without importing them.

        Names registered by two distributions are listed once for each.
        """
        refs = (self._ref(entry) for entry in self._entries())
        return tuple(sorted(refs, key=lambda ref: (ref.name, ref.distribution)))

    def find(self, name: str) -> R:
        """Find a member by name or ``FILE.py:CLASS``, without importing it.

        Built-in members cannot be replaced and take precedence over others of the same name.

        Raises:
            Exception: of type ``wrong``: an unknown name (with a suggestion), a name registered by
                two distributions, or a file that does not exist or has no such class; of type
                ``broken``: a file that is not valid Python.
        """
        in_file = split_name(name)
        if in_file is None:
            return self._ref(self._find(name))
        with self._file_errors(name):
            check_class(*in_file)
        return self.ref(name, "file", name)

    def files(self, name: str) -> dict[str, str]:
        """The file of ``FILE.py:CLASS`` with its SHA-256; empty for a registered name.

        A changed file is another member: record the result with what was computed, and compare it.

        Raises:
            Exception: of type ``wrong``: the file cannot be read.
        """
        in_file = split_name(name)
        if in_file is None:
            return {}
        with self._file_errors(name):
            return {in_file[0]: hash_file(in_file[0])}

    def ignored(self) -> tuple[R, ...]:
        """Members that are ignored because they use the name of a built-in one."""
        built_in = {ref.name for ref in self.available() if ref.distribution == _BUILT_IN}
        return tuple(
            ref
            for ref in self.available()
            if ref.name in built_in and ref.distribution != _BUILT_IN
        )

    def suggest(self, word: str) -> str | None:
        """The member that a word probably refers to, or None."""
        names = {entry.name for entry in self._entries()}
        meant = self.elsewhere.get(_squeezed(word))
        if meant in names:
            return meant
        same = [name for name in names if _squeezed(name) == _squeezed(word)]
        close = same or difflib.get_close_matches(word, sorted(names), n=1)
        return close[0] if close else None

    def load(self, name: str, bases: tuple[type, ...], expected: str) -> type[Any]:
        """Import the class of a member.

        Args:
            name: name of the member, or ``FILE.py:CLASS``.
            bases: the class must derive from one of them and define its abstract methods.
            expected: name of the bases in messages.

        Raises:
            Exception: of type ``wrong``: as in :meth:`find`, or not such a class; of type
                ``broken``: the import failed. If the environment variable ``KDLOSSES_DEBUG`` is
                set, the message contains the traceback.
        """
        in_file = split_name(name)
        if in_file is not None:
            with self._file_errors(name):
                return load_class(*in_file, bases, expected)
        entry = self._find(name)
        origin = f"{self.kind} {name!r} of distribution {_distribution(entry)!r} ({entry.value})"
        try:
            loaded = entry.load()
        # Also SystemExit, since a plugin may call sys.exit() on import.
        except (Exception, SystemExit) as error:
            detail = f"{type(error).__name__}: {error} (set {DEBUG_VARIABLE}=1 for the traceback)"
            if os.environ.get(DEBUG_VARIABLE):
                detail = traceback.format_exc()
            raise self.broken(f"{origin} cannot be imported: {detail}") from error
        if not (isinstance(loaded, type) and issubclass(loaded, bases)):
            raise self.wrong(f"{origin} is not a subclass of {expected}")
        found: type[Any] = loaded
        if inspect.isabstract(found):
            missing = ", ".join(sorted(found.__abstractmethods__))
            raise self.wrong(f"{origin} does not define {missing}")
        return found

    def build(
        self, name: str, kind: type[Any], known: Collection[str], given: Mapping[str, str]
    ) -> Any:
        """Construct a pydantic class from parameters given as text.

        Args:
            name: name of the member, for messages.
            kind: class of the member.
            known: names of its parameters.
            given: the parameters.

        Raises:
            Exception: of type ``wrong``: an unknown parameter (with a suggestion), or a value out
                of bounds.
        """
        from pydantic import ValidationError

        for key in given:
            if key not in known:
                takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
                hint = _did_you_mean(key, known)
                raise self.wrong(f"{self.kind} {name!r} has no parameter {key!r}{hint}; {takes}")
        try:
            return kind(**given)
        except ValidationError as error:
            first: Any = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "parameters"
            reason = first["msg"].removeprefix("Value error, ")
            raise self.wrong(
                f"{self.kind} {name!r}: {where}={first['input']!r}: {reason}"
            ) from error

    def _file_errors(self, name: str) -> AbstractContextManager[None]:
        return spec_errors(f"{self.kind} {name!r}", self.wrong, self.broken)

    def _entries(self) -> list[EntryPoint]:
        return list(entry_points(group=self.group))

    def _ref(self, entry: EntryPoint) -> R:
        return self.ref(entry.name, _distribution(entry), entry.value)

    def _find(self, name: str) -> EntryPoint:
        entries = self._entries()
        matches = [entry for entry in entries if entry.name == name]
        if not matches:
            names = sorted({entry.name for entry in entries})
            meant = self.suggest(name)
            hint = f", did you mean {meant!r}?" if meant else ""
            raise self.wrong(
                f"unknown {self.kind} {name!r}{hint}; {self.listing!r} shows all {len(names)}"
            )
        distributions = sorted({_distribution(entry) for entry in matches})
        if len(distributions) > 1 or len({entry.value for entry in matches}) > 1:
            built_in = [entry for entry in matches if _distribution(entry) == _BUILT_IN]
            if built_in:
                return built_in[0]
            raise self.wrong(
                f"{self.kind} {name!r} is registered by {' and '.join(distributions)}; uninstall "
                "all but one"
            )
        return matches[0]


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"


def _squeezed(word: str) -> str:
    """A name in lower case, without separators and a final word loss."""
    return re.sub(r"[^a-z0-9]", "", word.lower()).removesuffix("loss")


def _did_you_mean(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
