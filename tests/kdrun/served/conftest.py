"""A pretended server with the teacher of the tiny pair, and runs that distil from it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pretend import Model, Pretend


@pytest.fixture(scope="session")
def teacher_model(tiny_pair: Any) -> Model:
    return Model(tiny_pair.teacher)


@pytest.fixture(scope="session")
def other_folder(tiny_pair: Any, tiny_tokenizer: Any, tmp_path_factory: Any) -> Path:
    """Another teacher of the same shape and tokenizer."""
    from pair_configs import tiny_llama

    folder: Path = tmp_path_factory.mktemp("other") / "teacher"
    tiny_llama(len(tiny_tokenizer), 32, 7).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pretend(teacher_model: Model, tmp_path: Path) -> Iterator[Callable[..., Pretend]]:
    """Starts servers, which end with the test."""
    servers: list[Pretend] = []

    def start(model: Model = teacher_model, **options: Any) -> Pretend:
        states = options.pop("states", tmp_path / "states")
        servers.append(Pretend(model, states=states, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(pretend: Callable[..., Pretend]) -> Pretend:
    return pretend()


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask again sooner than real servers could answer."""
    monkeypatch.setattr("kdrun.served.client._FIRST_PAUSE_S", 0.02)
