"""MkDocs hook: a page for each registered loss, one for the configuration and one of packages.

They are made from what losses and keys say about themselves. Losses of installed plugins get pages
too. A loss that cannot be imported is listed as broken.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from kdlosses import BrokenLossError, LossRef, LossSpecError, available_losses, find_loss, get_loss
from kdrun.config.show import default_yaml
from kdrun.errors import InputError
from kdrun.losses.describe import doc_parts, parameters, traits
from kdrun.losses.plot import SETTING, write_plot

sys.path.insert(0, str(Path(__file__).parent))

from packages import page as packages_page

if TYPE_CHECKING:
    from kdlosses import Loss

INDEX = "losses/index.md"
CONFIGURATION = "configuration.md"
PACKAGES = "packages.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages below the entry of their index."""
    pages = [{"All losses": INDEX}, *(f"losses/{ref.name}.md" for ref, _ in _usable())]
    config.nav = [
        {title: pages} if target == INDEX else {title: target}
        for entry in config.nav or ()
        for title, target in entry.items()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the index, and a page and a picture for each loss."""
    files.append(File.generated(config, INDEX, content=_index()))
    files.append(File.generated(config, CONFIGURATION, content=_configuration()))
    files.append(File.generated(config, PACKAGES, content=packages_page()))
    with tempfile.TemporaryDirectory() as folder:
        for ref, loss in _usable():
            picture = Path(folder) / f"{ref.name}.svg"
            try:
                write_plot(ref.name, picture)
            except InputError as error:
                plot = [_markdown(f"No plot: {error}")]
            else:
                svg = picture.read_bytes()
                files.append(File.generated(config, f"losses/{picture.name}", content=svg))
                plot = [f"![Value and gradient of {ref.name}]({picture.name})", "", SETTING]
            page = _page(ref, loss, plot)
            files.append(File.generated(config, f"losses/{ref.name}.md", content=page))
    return files


def _configuration() -> str:
    return (
        "# The configuration\n\nWhat `kdrun config` prints. A file holds what differs, "
        "`--set section.key=value` and the [flags](command-line.md#training) win over it; the "
        "folder of a run keeps the whole in `config.yaml`.\n\n"
        f"```yaml\n{default_yaml()}```\n"
    )


def _usable() -> Iterator[tuple[LossRef, Loss]]:
    """The losses that a name stands for: no broken ones, none that lost its name to another."""
    for name in sorted({ref.name for ref in available_losses()}):
        try:
            yield find_loss(name), get_loss(name).loss
        except (BrokenLossError, LossSpecError):
            continue


def _index() -> str:
    rows = []
    for ref, loss in _usable():
        parts, facts = doc_parts(loss), traits(loss)
        curvature = "" if facts["curvature"] is None else f"{facts['curvature']:g}"
        rows.append(
            f"| [{ref.name}]({ref.name}.md) | {_markdown(parts.title)}: {_code(parts.formula)} "
            f"| {curvature} | {facts['temperature_power']} | {ref.distribution} |"
        )
    usable = {ref.name for ref, _ in _usable()}
    broken = [
        f"- `{ref.name}` of `{ref.distribution}` cannot be used."
        for ref in available_losses()
        if ref.name not in usable
    ]
    return "\n".join(
        [
            "# Losses",
            "",
            "p is the teacher's distribution over the next token, q the student's. Every loss also "
            "exists with the suffix `_chunked`, with the same value and gradient, see "
            "[chunked evaluation](../chunked-evaluation.md). Curvature is the strength near "
            "equality relative to KL; the value falls like T to minus the temperature power when "
            "both sides are softened by T, and is multiplied by T to that power.",
            "",
            "| name | loss | curvature | temperature power | distribution |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *broken,
            "",
        ]
    )


def _page(ref: LossRef, loss: Loss, plot: list[str]) -> str:
    parts, fields = doc_parts(loss), parameters(loss)
    chosen = ",".join(f"{field.name}={field.value}" for field in fields)
    spec = f"{ref.name}_chunked" + (f":{chosen}" if chosen else "")
    module, _, name = ref.module.partition(":")
    lines = [f"# {ref.name}", "", f"{_markdown(parts.title)}:", ""]
    lines += ["```text", parts.formula, "```", ""]
    lines += _paragraphs(parts.about)
    if parts.limits:
        lines += ["## When not to use it", "", *_paragraphs(parts.limits)]
    lines += ["## Value and gradient", "", *plot, "", "## Parameters", ""]
    if fields:
        lines += ["| parameter | default | bounds | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{field.name}` | {_code(field.value)} | {_code(field.bounds)} "
            f"| {_markdown(field.meaning)} |"
            for field in fields
        ]
    else:
        lines.append("None.")
    lines += ["", "## Use", "", "```", f"kdrun --loss {spec} --kd-ratio 0.5"]
    lines += [f"kdrun losses check {ref.name}", "```", "", "```python", "import kdlosses", ""]
    lines += [f'loss = kdlosses.get_loss("{spec}")']
    lines += ["objective = kdlosses.KDObjective(loss, kd_ratio=0.5)", "```", ""]
    lines += [f"The class is `{name}` in `{module}`; the distribution `{ref.distribution}`"]
    lines += ["registers it.", "", "## Traits", ""]
    lines += ["What the loss declares, and the [conformance checks](../write-a-loss.md#traits)"]
    lines += ["hold it to:", "", "| trait | value |", "|---|---|"]
    lines += [f"| `{trait}` | {_fact(value)} |" for trait, value in traits(loss).items()]
    lines += ["", "## Reference", "", _linked(_markdown(parts.reference)), ""]
    return "\n".join(lines)


def _paragraphs(texts: list[str]) -> list[str]:
    return [line for text in texts for line in (_markdown(text), "")]


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return "; ".join(f"`{check}`: {_markdown(reason)}" for check, reason in value.items())
    return _markdown(str(value))


def _code(text: str) -> str:
    return f"`{text}`" if text not in ("", "-") else text


def _markdown(text: str) -> str:
    """Plain text of a docstring, double backticks aside, so that Markdown shows it as it is."""
    pieces = re.split(r"``(.+?)``", text)
    return "".join(
        _code(piece)
        if index % 2
        else re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(piece, quote=False))
        for index, piece in enumerate(pieces)
    )


def _linked(text: str) -> str:
    text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"doi:(\S+\w)", r"[doi:\1](https://doi.org/\1)", text)
