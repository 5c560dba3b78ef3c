"""A server that cannot serve a run is refused at its start: one line with the cure, exit code 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretend import Fault, Model, Pretend
from runs import TOP_K, command, start

Refused = Callable[..., str]


@pytest.fixture
def refused(tiny_pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The last line of a run that ends with exit code 2, before anything is written."""

    def run(address: str, *more: object, quick: bool = True) -> str:
        folder = tmp_path / "run"
        patience = ["--set", "served.patience=0.3"] if quick else []
        code, lines = command(capsys, *start(tiny_pair, address, folder, *patience, *more))
        assert code == 2, lines
        assert sum(line.startswith("kdrun: ") for line in lines) == 1, lines
        assert lines[-1].startswith("kdrun: ")
        assert not (folder / "config.yaml").exists()
        assert not list(folder.glob("checkpoints/*"))
        return lines[-1]

    return run


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_nobody_listens(refused: Refused) -> None:
    line = refused(f"http://127.0.0.1:{free_port()}")
    assert "cannot be reached" in line
    assert "served.patience" in line


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://", "names no host"),
        ("http://127.0.0.1:99999", "not an address"),
        ("http://127.0.0.1:x", "not an address"),
        ("http://[::1", "not an address"),
        ("http://exa mple:80", "not an address"),
        ("http://a..b:80", "not an address"),
        ("http://user:MARKER@127.0.0.1:80", "KDRUN_API_KEY"),
        ("http://127.0.0.1:80?key=MARKER", "query"),
    ],
)
def test_addresses_that_are_none(refused: Refused, address: str, said: str) -> None:
    line = refused(address)
    assert said in line
    assert "MARKER" not in line


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("status", 401), "KDRUN_API_KEY"),
        (Fault("status", 403), "KDRUN_API_KEY"),
        (Fault("status", 404), "OpenAI"),
        (Fault("status", 400), "refuses (status 400): not now"),
        (Fault("status", 429), "not ready (status 429)"),
        (Fault("status", 503, retry_after="60"), "not ready (status 503)"),
        (Fault("status", 500), "not ready (status 500)"),
        (Fault("hang", 20), "does not answer within 0.4 s (served.timeout)"),
        (Fault("close"), "cannot be reached"),
        (Fault("broken"), "cannot be reached"),
        (Fault("cut"), "cut off"),
        (Fault("text", ""), "does not list its models"),
        (Fault("text", "<html>hello</html>"), "no JSON"),
        (Fault("text", "[" * 20000), "no JSON"),
        (Fault("json", {"data": [{"name": "x"}]}), "does not list its models"),
        (Fault("json", [1, 2]), "does not list its models"),
        (Fault("json", {"data": "x"}), "does not list its models"),
        (Fault("redirect", "http://elsewhere.invalid"), "redirects to http://elsewhere.invalid"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_server_that_does_not_list_its_models(
    refused: Refused, server: Pretend, fault: Fault, said: str
) -> None:
    server.begin(forever=Fault(fault.kind, fault.value, fault.retry_after, "/v1/models"))
    more = ("--set", "served.timeout=0.4") if fault.kind == "hang" else ()
    assert said in refused(server.address, *more)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "log-probability nan"),
        ("few", "7 of 8 log-probabilities"),
        ("foreign", "token 296 is outside the vocabulary of 296"),
        ("positions", "positions of a prompt"),
        ("mass", "add up to"),
        ("no_scores", "0 positions"),
        ("cut", "cut off"),
    ],
)
def test_wrong_scores_of_the_probe(refused: Refused, server: Pretend, kind: str, said: str) -> None:
    server.begin(Fault("none"), forever=Fault(kind))  # the first asks for five entries
    assert said in refused(server.address, *TOP_K, "--set", "served.patience=5", quick=False)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("other_ids", "another prompt"),
        ("nan_states", "not finite"),
        ("no_file", "served.folder"),
        ("failed", "No space left on device"),
        ("short_states", "shape"),
        ("cut_file", "cannot be read"),
        ("no_states", "kdrun served connector"),
        ("outside", "served.folder"),
    ],
)
def test_wrong_states_of_the_probe(
    refused: Refused, server: Pretend, tmp_path: Path, kind: str, said: str
) -> None:
    server.begin(Fault("none"), forever=Fault(kind))
    form = ("--set", "served.form=states", "--set", f"served.folder={server.states}")
    if kind in ("no_file", "outside"):
        form += ("--set", "served.timeout=1", "--set", "served.patience=20")
    assert said in refused(server.address, *form)
    if kind == "outside":  # it was neither read nor removed
        assert (tmp_path / "outside.safetensors").is_file()


def test_states_that_do_not_give_the_servers_own_scores(
    refused: Refused, server: Pretend, other_folder: Path
) -> None:
    form = ("--set", "served.form=states", "--set", f"served.folder={server.states}")
    line = refused(server.address, *form, "--set", f"served.head={other_folder}")
    assert "differ by" in line
    assert "served.head" in line


def test_more_entries_than_the_server_allows(refused: Refused, server: Pretend) -> None:
    line = refused(server.address, *TOP_K, "--set", "served.top_k=200")
    assert "greater than max allowed: 128" in line
    assert "--max-logprobs 200" in line
    assert "served.top_k" in line


def test_more_entries_than_tokens(refused: Refused, server: Pretend) -> None:
    line = refused(server.address, *TOP_K, "--set", "served.top_k=400")
    assert "served.top_k=400: the vocabulary has 296 tokens" in line


def test_a_context_that_is_too_short(
    refused: Refused, pretend: Callable[..., Pretend], tiny_pair: Any, tmp_path: Path, capsys: Any
) -> None:
    short = pretend(max_length=128)
    line = refused(short.address, *TOP_K)
    assert "--max-model-len 129" in line
    assert "--max-length 127" in line
    enough = pretend(max_length=129)
    more = (*TOP_K, "--max-steps", 1)
    assert command(capsys, *start(tiny_pair, enough.address, tmp_path / "fits", *more))[0] == 0


def test_models_by_name(refused: Refused, pretend: Callable[..., Pretend]) -> None:
    two = pretend(names=("one", "two"))
    assert "2 models (one, two)" in refused(two.address, *TOP_K)
    line = refused(two.address, *TOP_K, "--set", "served.model=three")
    assert "served.model=three" in line
    assert "one, two" in line
    assert "0 models (none)" in refused(pretend(names=()).address, *TOP_K)


@pytest.fixture
def shifted(tiny_pair: Any, tmp_path: Path) -> Model:
    """The teacher with a tokenizer in which two merged tokens are exchanged."""
    folder = tmp_path / "shifted"
    shutil.copytree(tiny_pair.teacher, folder)
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text())
    vocab = found["model"]["vocab"]
    first, second = sorted(vocab, key=lambda token: -vocab[token])[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(found))
    return Model(folder)


def test_another_tokenizer(
    refused: Refused, pretend: Callable[..., Pretend], shifted: Model
) -> None:
    line = refused(pretend(shifted).address, *TOP_K)
    assert "tokenises differently from the student: after" in line
    assert "the student has token 29" in line
    assert "and the server 29" in line


def test_a_server_that_cannot_tokenise(
    refused: Refused,
    pretend: Callable[..., Pretend],
    tiny_pair: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = pretend(tokenizes=False)
    assert "served.tokenizer=FOLDER" in refused(server.address, *TOP_K)
    cure = (*TOP_K, "--set", f"served.tokenizer={tiny_pair.teacher}", "--max-steps", 1)
    assert command(capsys, *start(tiny_pair, server.address, tmp_path / "run", *cure))[0] == 0


def test_a_temperature_that_the_server_ignores(
    refused: Refused,
    pretend: Callable[..., Pretend],
    tiny_pair: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = (*TOP_K, "--temperature", 2, "--max-steps", 1)
    line = refused(pretend().address, *more)
    assert "--logprobs-mode processed_logprobs" in line
    softens = pretend(softens=True)
    assert command(capsys, *start(tiny_pair, softens.address, tmp_path / "run", *more))[0] == 0


def test_a_certificate_that_nobody_signed(
    refused: Refused, pretend: Callable[..., Pretend], tmp_path: Path
) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "both.pem"
    subprocess.run(
        [
            *(openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    server = pretend(certificate=certificate)
    line = refused(server.address, *TOP_K, "--set", "served.patience=60", quick=False)
    assert "certificate" in line
    assert not server.requests


def test_https_to_a_server_without_it(refused: Refused, server: Pretend) -> None:
    address = server.address.replace("http:", "https:")
    line = refused(address, *TOP_K, "--set", "served.patience=60", quick=False)
    assert "does not speak https; write http:// instead" in line


@pytest.mark.parametrize(
    "fault", [Fault("status", 503), Fault("close"), Fault("cut"), Fault("nan")]
)
def test_what_passes_is_waited_for(
    server: Pretend,
    tiny_pair: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Fault,
) -> None:
    models = Fault(fault.kind, fault.value, path="/v1/models")
    server.begin(*([] if fault.kind == "nan" else [models]), fault)
    more = (*TOP_K, "--max-steps", 1, "--set", "served.patience=10")
    code, lines = command(capsys, *start(tiny_pair, server.address, tmp_path / "run", *more))
    assert code == 0, lines
    assert any("asking again for 10 s (served.patience)" in line for line in lines)
