"""``kdrun losses new``: create a package with one loss, its tests, a CI file and a README."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template

from kdlosses import (
    BrokenLossError,
    LossSpecError,
    PluginRef,
    available_losses,
    get_loss,
    parse_spec,
)
from kdrun.errors import InputError

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_RESERVED = "_chunked"
_PROBABILITIES = ((0.5, 0.3, 0.2), (0.25, 0.35, 0.4))

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The $what $name for kdlosses and kdrun."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["kdlosses$range"]

[project.optional-dependencies]
dev = ["pytest>=8"]

[project.entry-points."kdlosses.$group"]
$name = "$package:$class_name"

[tool.setuptools.packages.find]
where = ["src"]

[tool.setuptools.package-data]
$package = ["py.typed"]
"""

_LOSS = '''\
"""The loss $name: replace the example with your own formula."""

from kdlosses import Divergence
from pydantic import Field
from torch import Tensor


class $class_name(Divergence):
    """Weighted triangular discrimination, sum (p - q)^2 / (w p + (1 - w) q) with w = weight.

    p is the teacher, q the student. Bounded by 1 / w + 1 / (1 - w) and finite for any pair.

    Not recommended if the student starts far from the teacher, where the value saturates and the
    gradient vanishes.

    Reference: Topsoe 2000, doi:10.1109/18.850703 (half of this at w = 1/2).
    """

    # Traits: declared properties of the loss, which the conformance checks verify.
    coarse_graining_monotone = True

    weight: float = Field(0.5, gt=0, lt=1, description="the teacher's share in the denominator")

    def integrand(self, teacher_log_probs: Tensor, student_log_probs: Tensor) -> Tensor:
        """Return one term per vocabulary entry, without reduction; log-probabilities are finite."""
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        return (p - q) ** 2 / (self.weight * p + (1 - self.weight) * q).clamp_min(1e-30)

    def curvature(self) -> float:
        """2, since near equality this is sum (p - q)^2 / p, and KL is half of that."""
        return 2.0
'''

_TEST = '''\
"""The conformance checks of kdlosses, and a value computed by hand."""

import kdlosses
import pytest
import torch
from kdlosses.testing import Check, parametrize_with_checks
from $package import $class_name

NAME = "$name"


@parametrize_with_checks([NAME, f"{NAME}:weight=0.2"])
def test_the_loss_conforms(loss: $class_name, check: Check) -> None:
    check(loss)


@pytest.mark.parametrize("name", [NAME, f"{NAME}_chunked"])
def test_value_is_that_of_the_formula(name: str) -> None:
    teacher = torch.tensor([[0.5, 0.5]]).log()
    student = torch.tensor([[0.25, 0.75]]).log()
    value = kdlosses.get_loss(name)(student, teacher, torch.tensor([0]))
    assert value.item() == pytest.approx(0.0625 / 0.375 + 0.0625 / 0.625, rel=1e-6)
'''

_TEST_OF_FILE = '''\
"""The conformance checks of kdlosses, and a value."""

import kdlosses
import pytest
import torch
from kdlosses.testing import Check, parametrize_with_checks
from $package import $class_name

NAME = "$name"


@parametrize_with_checks([NAME])
def test_the_loss_conforms(loss: $class_name, check: Check) -> None:
    check(loss)


# The value when the package was made; replace it by one that you computed by hand.
@pytest.mark.parametrize("name", [NAME, f"{NAME}_chunked"])
def test_value_has_not_changed(name: str) -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2]]).log()
    student = torch.tensor([[0.25, 0.35, 0.4]]).log()
    value = kdlosses.get_loss(name)(student, teacher, torch.tensor([0]))
    assert value.item() == pytest.approx($value, rel=1e-5)
'''

_CI = """\
# Runs the tests and the conformance checks on GitHub; other services need the same three commands.
name: tests
on: [push, pull_request]
jobs:
  tests:
    runs-on: ubuntu-latest
    strategy:
      matrix:
        python: ["3.11", "3.13"]
    steps:
      - uses: actions/checkout@v4
      - uses: actions/setup-python@v5
        with:
          python-version: $${{ matrix.python }}
      - run: pip install -e '.[dev]'
      - run: pytest
      - run: kdrun $group check $name --json
"""

_README = """\
# $distribution

The $what `$name` for kdlosses and kdrun.

```
pip install -e '.[dev]'
pytest
kdrun $group check $name
kdrun $use
```

It is in `src/$package/__init__.py`: $parts, the parameters with their bounds, and the traits.
`pytest` runs the conformance checks, which find most mistakes in them.

`pyproject.toml` accepts kdlosses$range, the versions whose interface the package was written for.
Widen the range when the tests pass with a newer version.
"""


@dataclass(frozen=True)
class Kind:
    """What a new package registers.

    Attributes:
        what: its name in messages and texts.
        group: the group ``kdlosses.GROUP``, which is also the command ``kdrun GROUP``.
        suffix: end of the name of its class.
        use: how kdrun uses it, with ``$name``.
        parts: what its method computes, for the README.
        available: the registered members.
    """

    what: str
    group: str
    suffix: str
    use: str
    parts: str
    available: Callable[[], Sequence[PluginRef]]


_KIND = Kind("loss", "losses", "Loss", "--loss ${name}_chunked", "the integrand", available_losses)


def new_loss(name: str, output: str | None, source: str | None = None) -> Path:
    """Create a package that registers the loss ``name``.

    Args:
        name: name of the loss on the command line.
        output: output folder; by default ``./kdlosses-<name>``.
        source: a loss ``FILE.py:CLASS``, whose file becomes the module of the package; by default
            an example.

    Returns:
        The folder.

    Raises:
        InputError: a name that is malformed, reserved or already registered, an existing folder, or
            a source that is not a loss of a file.
    """
    words = new_words(_KIND, name)
    if name.endswith(_RESERVED):
        raise InputError(
            f"loss {name!r}: the suffix {_RESERVED!r} is reserved, because every loss has that "
            f"variant; use {name.removesuffix(_RESERVED)!r}"
        )
    module, test = Template(_LOSS).substitute(words), _TEST
    if source is not None:
        module, class_name, value = _read_loss(source)
        words |= {"class_name": class_name, "value": f"{value:.6g}"}
        test = _TEST_OF_FILE
    return write_package(words, module, test, output)


def new_words(kind: Kind, name: str) -> dict[str, str]:
    """The words of the templates of a package: its names, and the versions it accepts.

    Raises:
        InputError: a name that is malformed or already registered.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{kind.what} {name!r}: a name consists of lower-case letters, digits and single "
            "underscores, such as my_divergence"
        )
    taken = [ref.distribution for ref in kind.available() if ref.name == name]
    if taken:
        raise InputError(
            f"{kind.what} {name!r} is already registered by {taken[0]}; choose another name"
        )
    return {
        "name": name,
        "distribution": f"kdlosses-{name.replace('_', '-')}",
        "package": f"kdlosses_{name}",
        "class_name": _class_name(name, kind.suffix),
        "range": _range(version("kdlosses")),
        "what": kind.what,
        "group": kind.group,
        "use": Template(kind.use).substitute(name=name),
        "parts": kind.parts,
    }


def write_package(words: Mapping[str, str], module: str, test: str, output: str | None) -> Path:
    """Write the files of a package.

    Args:
        words: from :func:`new_words`.
        module: content of its module.
        test: content of its test, with ``$words``.
        output: output folder; by default ``./<distribution>``.

    Returns:
        The folder.

    Raises:
        InputError: the folder exists.
    """
    folder = Path(output or words["distribution"])
    if folder.exists():
        raise InputError(f"{folder} already exists; choose another folder with --output")
    templates = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        ".github/workflows/tests.yml": _CI,
        f"tests/test_{words['name']}.py": test,
    }
    contents = {path: Template(template).substitute(words) for path, template in templates.items()}
    contents[f"src/{words['package']}/py.typed"] = ""
    for path, content in {**contents, f"src/{words['package']}/__init__.py": module}.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    return folder


def _read_loss(source: str) -> tuple[str, str, float]:
    """The text of a loss's file, its class, and its value in the test that is written.

    Raises:
        InputError: another form, or the loss cannot be used.
    """
    try:
        parsed = parse_spec(source)
        [term, *others] = parsed.terms
        if others or term.file is None or term.parameters or term.weight != 1 or parsed.chunked:
            raise InputError(f"--from {source}: expected FILE.py:CLASS, such as my_loss.py:MyLoss")
        loss = get_loss(source)
    except (LossSpecError, BrokenLossError) as error:
        raise InputError(f"--from: {error}") from error
    import torch

    teacher, student = (torch.tensor([row]).log() for row in _PROBABILITIES)
    value = loss(student, teacher, torch.tensor([0])).item()
    file = Path(term.file).expanduser()
    return file.read_text(encoding="utf-8"), type(loss.loss).__name__, value


def _range(installed: str) -> str:
    """The versions of kdlosses with the interface of the installed one: ``>=0.1,<0.2``."""
    major, minor = (int(re.sub(r"\D.*", "", part) or 0) for part in f"{installed}.0".split(".")[:2])
    return (
        f">={major}.{minor},<{major}.{minor + 1}"
        if major == 0
        else f">={major}.{minor},<{major + 1}"
    )


def _class_name(name: str, suffix: str) -> str:
    """``my_divergence`` becomes ``MyDivergenceLoss``; the suffix avoids imported names."""
    words = "".join(word.capitalize() for word in name.removesuffix("_loss").split("_"))
    return f"{words}{suffix}"
