"""Members of a group from a file that is not installed: ``my_loss.py:Triangular``.

The file is code that the user names, and is executed like an installed module. It is identified by
the SHA-256 of its content: a changed file is another loss.
"""

import ast
import difflib
import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

DEBUG_VARIABLE = "KDLOSSES_DEBUG"
"""If this is set in the environment, messages about failed imports contain the traceback."""

_OF_FILE = ".py:"


class LossFileError(ValueError):
    """A file that does not exist, or has no such class."""


class BrokenFileError(ImportError):
    """A file that cannot be executed; the message names the line."""


@contextmanager
def spec_errors(what: str, wrong: type[Exception], broken: type[Exception]) -> Iterator[None]:
    """Context that turns errors of a file into those of a group of plugins.

    Args:
        what: what the file was named for, in messages.
        wrong: replaces :class:`LossFileError`.
        broken: replaces :class:`BrokenFileError`.
    """
    try:
        yield
    except LossFileError as error:
        raise wrong(f"{what}: {error}") from error
    except BrokenFileError as error:
        raise broken(f"{what}: {error}") from error


def split_name(name: str) -> tuple[str, str] | None:
    """File and class of ``FILE.py:CLASS``; None for the name of a registered class."""
    path, _, class_name = name.rpartition(":")
    return (path, class_name) if _OF_FILE in name else None


def hash_file(path: str) -> str:
    """The SHA-256 of a file's content.

    Raises:
        LossFileError: the file cannot be read.
    """
    return hashlib.sha256(_read(path)).hexdigest()


def check_class(path: str, name: str) -> None:
    """Refuse a class that a file does not define, without executing the file.

    Raises:
        LossFileError: the file cannot be read or has no such class; suggests close names.
        BrokenFileError: the file is not valid Python.
    """
    names, classes = _defined(path, _read(path))
    if name not in names:
        close = difflib.get_close_matches(name, classes, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        has = f"it has {', '.join(classes)}" if classes else "it has no class"
        raise LossFileError(f"{path} has no class {name!r}{hint}; {has}")


def classes_in(path: str) -> list[str]:
    """The classes that a file defines, for suggestions; empty if it cannot be read."""
    try:
        return _defined(path, _read(path))[1]
    except (LossFileError, BrokenFileError):
        return []


def load_class(path: str, name: str, bases: tuple[type, ...], expected: str) -> type[Any]:
    """Execute a file, once for each content, and return one of its classes.

    Args:
        path: the file.
        name: the class.
        bases: the class must derive from one of them and define its abstract methods.
        expected: name of the bases in messages.

    Raises:
        LossFileError: as in :func:`check_class`, or not such a class.
        BrokenFileError: the file cannot be executed. If the environment variable ``KDLOSSES_DEBUG``
            is set, the message contains the traceback.
    """
    check_class(path, name)
    module = _module(path)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, bases)):
        raise LossFileError(f"{path}: {name} is not a subclass of {expected}")
    kind: type[Any] = found
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(kind.__abstractmethods__))
        raise LossFileError(f"{path}: {name} does not define {missing}")
    return kind


def _module(path: str) -> ModuleType:
    content = _read(path)
    file = _expand(path).resolve()
    # Both file and content are in the name, so that an edited file is another module, and pickle
    # finds the classes of each.
    digest = hashlib.sha256(str(file).encode() + b"\0" + content).hexdigest()
    name = f"_kdlosses_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    try:
        exec(compile(content, str(file), "exec"), module.__dict__)
    # Also SystemExit, since a file may call sys.exit().
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(path, error, str(file)) from error
    return module


def _defined(path: str, content: bytes) -> tuple[set[str], list[str]]:
    """The names that a file binds at its top level, and its classes."""
    try:
        tree = ast.parse(content, path)
    except (SyntaxError, ValueError) as error:
        raise _broken(path, error, path) from error
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names, [node.name for node in tree.body if isinstance(node, ast.ClassDef)]


def _broken(path: str, error: BaseException, file: str) -> BrokenFileError:
    if isinstance(error, SyntaxError) and error.filename in (path, file):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == file), None)
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    what = " ".join(f"{type(error).__name__}: {said}".split())
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        beside = _expand(path).parent / f"{error.name.split('.')[0]}.py"
        if beside.is_file():
            what += "; a loss file must not import files beside it, because only its own content is"
            what += " recorded"
    detail = f"{what} (set {DEBUG_VARIABLE}=1 for the traceback)"
    if os.environ.get(DEBUG_VARIABLE):
        detail = "".join(traceback.format_exception(error))
    place = f"line {line}: " if line else ""
    return BrokenFileError(f"{path} cannot be loaded: {place}{detail}")


def _read(path: str) -> bytes:
    file = _expand(path)
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        folder = file.parent
        others = [other.name for other in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(file.name, others, n=1)
        hint = f", did you mean {str(Path(path).with_name(close[0]))!r}?" if close else ""
        raise LossFileError(f"there is no file {path}{hint}") from error
    except OSError as error:
        raise LossFileError(f"{path} cannot be read: {error.strerror or error}") from error


def _expand(path: str) -> Path:
    return Path(os.path.expanduser(path))
