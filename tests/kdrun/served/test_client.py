"""The client alone: what it asks again, when it gives up, and that it tells nobody the key."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from pretend import Fault, Pretend

from kdrun.errors import InputError
from kdrun.served.client import BadAnswerError, Client, Refusal, ServerError

MARKER = "MARKER-0123456789"
MODELS = "/v1/models"


@contextmanager
def client(
    server: Pretend, patience: float = 5.0, timeout: float = 2.0, said: list[str] | None = None
) -> Iterator[Client]:
    lines: list[str] = [] if said is None else said
    opened = Client(server.address, timeout, patience, lines.append)
    try:
        yield opened
    finally:
        opened.close()


def test_it_waits_as_long_as_the_server_asks(server: Pretend) -> None:
    server.begin(Fault("status", 429, retry_after="0.5", path=MODELS))
    with client(server) as asking:
        began = time.monotonic()
        asking.ask("GET", MODELS)
        assert time.monotonic() - began >= 0.5


def test_it_asks_once_more_when_its_patience_ends_before(server: Pretend) -> None:
    server.begin(Fault("status", 503, retry_after="3600", path=MODELS))
    with client(server, patience=0.3) as asking:
        asking.ask("GET", MODELS)
    server.begin(forever=Fault("status", 503, retry_after="3600", path=MODELS))
    with client(server, patience=0.3) as asking:
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"waited for 0\.3 s \(served\.patience\)"):
            asking.ask("GET", MODELS)
        assert 0.3 <= time.monotonic() - began < 1


def test_it_waits_longer_each_time_and_says_so_once(server: Pretend) -> None:
    server.begin(forever=Fault("status", 503, path=MODELS))
    said: list[str] = []
    with client(server, patience=1.0, said=said) as asking, pytest.raises(ServerError):
        asking.ask("GET", MODELS)
    assert 3 <= len(server.requests) <= 8
    assert len(said) == 1


def test_without_patience_nothing_is_asked_twice(server: Pretend) -> None:
    server.begin(Fault("status", 503, path=MODELS))
    with client(server, patience=0) as asking, pytest.raises(ServerError):
        asking.ask("GET", MODELS)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301, 308])
def test_refusals_are_final(server: Pretend, status: int) -> None:
    server.begin(Fault("status", status, path=MODELS))
    with client(server) as asking, pytest.raises(Refusal) as found:
        asking.ask("GET", MODELS)
    assert found.value.status == status
    assert len(server.requests) == 1


def test_wrong_answers_are_asked_for_three_times(server: Pretend) -> None:
    def read(answer: Any) -> None:
        raise BadAnswerError("is wrong")

    with client(server) as asking, pytest.raises(ServerError, match="is wrong, 3 times"):
        asking.ask("GET", MODELS, read=read)
    assert len(server.requests) == 3


def test_a_closed_client_waits_for_nothing(server: Pretend) -> None:
    server.begin(forever=Fault("status", 503, path=MODELS))
    asking = Client(server.address, 2.0, 60.0)
    threading.Timer(0.3, asking.close).start()
    began = time.monotonic()
    with pytest.raises(ServerError):
        asking.ask("GET", MODELS)
    assert time.monotonic() - began < 5


def test_the_key_goes_to_the_server_alone(
    server: Pretend, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRUN_API_KEY", f"{MARKER}\n")  # as a file of it ends
    elsewhere = pretend()
    server.key = MARKER
    with client(server) as asking:
        asking.ask("GET", MODELS)
        assert server.requests[-1].headers["authorization"] == f"Bearer {MARKER}"
        server.begin(Fault("redirect", elsewhere.address, path=MODELS))
        with pytest.raises(Refusal, match="redirects to"):
            asking.ask("GET", MODELS)
    assert not elsewhere.requests


def test_no_proxy_is_told_the_key(
    server: Pretend, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = pretend()
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.address)
    with client(server) as asking:
        asking.ask("GET", MODELS)
    assert server.requests
    assert not proxy.requests


@pytest.mark.parametrize("text", [f'{{"error": "key {MARKER}"}}', f"{'x' * 290}{MARKER}", MARKER])
def test_a_server_that_repeats_the_key_tells_nobody(
    server: Pretend, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("KDRUN_API_KEY", MARKER)
    monkeypatch.setattr(Pretend, "answer", lambda *_: (401, None))
    server.begin(Fault("text", text, path=MODELS))
    with client(server) as asking, pytest.raises(Refusal) as found:
        asking.ask("GET", MODELS)
    shown = "".join(traceback.format_exception(found.value))
    assert MARKER[:8] not in shown
    assert "KDRUN_API_KEY" in str(found.value)
    server.begin(Fault("redirect", f"http://elsewhere.invalid/?key={MARKER}", path=MODELS))
    with client(server) as asking, pytest.raises(Refusal) as found:
        asking.ask("GET", MODELS)
    assert MARKER not in "".join(traceback.format_exception(found.value))


@pytest.mark.parametrize("key", [f"{MARKER}\nX: y", f"{MARKER}\x07z", f"{MARKER}é"])
def test_a_key_that_cannot_be_sent_is_not_shown(
    server: Pretend, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("KDRUN_API_KEY", key)
    with pytest.raises(InputError, match="KDRUN_API_KEY has characters") as found:
        Client(server.address, 1.0, 1.0)
    assert MARKER not in "".join(traceback.format_exception(found.value))


def test_what_a_server_says_controls_no_terminal(
    server: Pretend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretend, "answer", lambda *_: (400, {"error": "a\x1b[31mb\nc\x9b"}))
    with client(server) as asking, pytest.raises(Refusal) as found:
        asking.ask("GET", MODELS)
    assert "a [31mb c" in str(found.value)


def test_over_every_new_connection_the_server_is_checked_before_its_answer_is_used(
    server: Pretend,
) -> None:
    checks: list[int] = []
    with client(server) as asking:
        asking.ask("GET", MODELS)
        asking.after_absence = lambda: checks.append(len(server.requests))
        asking.ask("GET", MODELS)
        assert checks == []
        server.stop()
        server.start()
        asking.ask("GET", MODELS)
        assert checks == [3]
        asking.ask("GET", MODELS)
        assert checks == [3]


def test_a_check_may_ask_itself(server: Pretend) -> None:
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        asking.ask("GET", MODELS)

    with client(server) as asking:
        asking.ask("GET", MODELS)
        asking.after_absence = check
        server.stop()
        server.start()
        asking.ask("GET", MODELS)
    assert checks == [1]


def test_no_thread_gets_an_answer_before_the_check_has_ended(server: Pretend) -> None:
    """The slow check of one thread holds back the answers of all, and its failure fails all."""
    failed: list[str] = []
    got: list[Any] = []

    def check() -> None:
        time.sleep(0.3)
        raise ServerError("another model")

    with client(server) as asking:
        asking.ask("GET", MODELS)
        asking.after_absence = check
        server.stop()
        server.start()

        def ask() -> None:
            try:
                got.append(asking.ask("GET", MODELS))
            except ServerError as error:
                failed.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not got
    assert failed == ["another model"] * 4


def test_a_quiet_server_is_checked(server: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    with client(server) as asking:
        asking.ask("GET", MODELS)
        asking.after_absence = lambda: checks.append(1)
        monkeypatch.setattr("kdrun.served.client._QUIET_S", 0.2)
        time.sleep(0.3)
        asking.ask("GET", MODELS)
        asking.ask("GET", MODELS)
    assert checks == [1]
