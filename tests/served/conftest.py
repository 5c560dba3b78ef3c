"""A real vLLM with SmolLM2, started once on loopback; without one, the tests skip."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAME = "smol"
CONTEXT = 513
"""Rows of 512 tokens, and the one that a server always adds."""


@dataclass
class Server:
    """A process of vLLM.

    Attributes:
        address: where it answers.
        model: the folder of its model.
        states: the folder of its states.
    """

    address: str
    model: Path
    states: Path
    line: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.line, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        until = time.monotonic() + 400
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=5)
            except (urllib.error.URLError, OSError):
                time.sleep(1)
            else:
                return
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 as a folder in float32, which both vLLM and transformers read."""
    from kdrun.models.load import load_model
    from kdrun.models.locate import locate_model
    from kdrun.models.tokenizers import load_tokenizer

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    source = locate_model(smollm2_gguf)
    load_model(source, "float32").save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server; its environment's Python is named by KDRUN_VLLM_PYTHON."""
    python = os.environ.get("KDRUN_VLLM_PYTHON")
    if not python:
        pytest.skip("KDRUN_VLLM_PYTHON does not name the Python of an environment with vLLM")
    folder = tmp_path_factory.mktemp("vllm")
    memory = Path("/dev/shm")
    states = (memory if memory.is_dir() else folder) / f"kdrun-states-{os.getpid()}"
    command = ["served", "connector", "--output", str(folder)]
    command += ["--model", str(smollm2), "--states", str(states)]
    printed = subprocess.run(
        [sys.executable, "-m", "kdrun", *command],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    line = printed.replace(" python ", f" exec {python} ").replace("--port 8000", f"--port {port}")
    options = (
        f" --dtype float32 --max-model-len {CONTEXT} --enforce-eager --max-logprobs 128"
        f" --max-num-seqs 16 --served-model-name {NAME}"
    )
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # lets it take weights in
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    one = Server(
        f"http://127.0.0.1:{port}",
        smollm2,
        states,
        ["bash", "-c", line.strip() + options],
        environment,
        folder / "log",
    )
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.kill()
        shutil.rmtree(states, ignore_errors=True)


@pytest.fixture(scope="session")
def alpaca(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short rows of Alpaca."""
    import json

    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [row for row in rows if len(row["instruction"] + row["output"]) < 300][:40]
    path = tmp_path_factory.mktemp("rows") / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in short), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def student(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of SmolLM2's layers."""
    from click.testing import CliRunner

    from kdrun.cli.main import cli

    folder = tmp_path_factory.mktemp("student") / "model"
    options = ["init-student", str(smollm2), "--keep-layers", "3", "--output", str(folder)]
    done = CliRunner().invoke(cli, options, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


Opened = Callable[..., Any]


@pytest.fixture(scope="session")
def opened(server: Server) -> Opened:
    """Opens the served teacher, with keys of the section ``served``."""
    from kdrun.config.sections import ModelConfig
    from kdrun.config.served_section import ServedConfig
    from kdrun.models.tokenizers import load_tokenizer
    from kdrun.served.probe import open_served

    tokenizer = load_tokenizer(server.model)

    def open_it(temperature: float = 1.0, **given: Any) -> Any:
        model = ModelConfig(teacher=server.address, student=str(server.model))
        served = ServedConfig(folder=str(server.states), **given)
        size = len(tokenizer)
        return open_served(model, served, tokenizer, size, [], 512, temperature, 1, print)

    return open_it
