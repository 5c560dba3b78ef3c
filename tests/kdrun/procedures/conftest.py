"""Small models whose every answer can be listed, and distributions that register procedures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Table(torch.nn.Module):
    """Next-token logits by the last token: a language model small enough for float64.

    What it has read is no part of it, so its cache only counts.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool = True,
        cache: Any = None,
    ) -> Any:
        return SimpleNamespace(
            logits=self.logits[input_ids],
            cache=SimpleNamespace(batch_select_indices=lambda keep: None),
        )


@pytest.fixture
def table() -> Callable[..., Table]:
    def make(seed: int, vocab: int = 4, scale: float = 1.0) -> Table:
        generator = torch.Generator().manual_seed(seed)
        return Table(scale * torch.randn(vocab, vocab, generator=generator, dtype=torch.float64))

    return make


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Registers procedures of a made-up distribution, with the text of its modules."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    written: list[str] = []

    def add(distribution: str, registered: dict[str, str], **modules: str) -> None:
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n", encoding="utf-8"
        )
        lines = [f"{name} = {target}" for name, target in registered.items()]
        (info / "entry_points.txt").write_text(
            "\n".join(["[kdrun.procedures]", *lines]), encoding="utf-8"
        )
        for name, text in modules.items():
            (site / f"{name}.py").write_text(text, encoding="utf-8")
            written.append(name)

    yield add
    for name in written:
        sys.modules.pop(name, None)
