"""Requests to a server that may be busy, away or wrong: retried where that can help.

Every answer is checked by its reader before it is used. Redirects are not followed, since a key
belongs to one host, and certificates are checked.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import httpx2

from kdrun.errors import InputError, TrainingError
from kdrun.models.address import KEY

T = TypeVar("T")
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 8.0
_ANSWERS = 3
"""How often a question is asked whose answers are wrong."""
_LOOKS_EVERY_S = 0.2
_QUIET_S = 20.0
"""A server that was not heard from for so long may be another one."""
_SHOWN = 300
_KEY_HINT = f"; set the environment variable {KEY} to the server's key"
_HINTS = {
    401: _KEY_HINT,
    403: _KEY_HINT,
    404: "; is it the address of a server with OpenAI's interface?",
}


class ServerError(TrainingError):
    """A server is away for longer than it is waited for, refuses, or answers wrongly."""


class BadAnswerError(Exception):
    """An answer has the wrong form or impossible numbers; the message says what is wrong."""


class Refusal(ServerError):  # noqa: N818 - what the server did
    """A server refused a request, which another attempt would not change.

    Args:
        message: one line.
        status: the status code.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Asks one server, from any number of threads.

    Args:
        address: as :func:`kdrun.models.address.clean_address` returns it.
        timeout: seconds for one answer.
        patience: seconds that a server that does not answer is waited for.
        say: called with a line when it begins to wait.

    Attributes:
        address: of the server.
        has_key: whether a key is sent.
        after_absence: checks that the server is the same; called before an answer is used that
            came over a new connection, or from a server that was away or quiet.

    Raises:
        InputError: the address or the key cannot be used.
    """

    def __init__(
        self,
        address: str,
        timeout: float,
        patience: float,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.address = address
        self.stopping: Callable[[], bool] = lambda: False
        self.after_absence: Callable[[], None] = lambda: None
        self._timeout, self._patience, self._say = timeout, patience, say
        self._key = _read_key()
        try:
            self._http = httpx2.Client(
                base_url=address,
                timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0)),
                headers={} if not self._key else {"Authorization": f"Bearer {self._key}"},
                limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
                follow_redirects=False,
                trust_env=False,  # a proxy would learn the key
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise InputError(
                f"{address!r} is no address ({_reason(error)}); write http://HOST:PORT"
            ) from error
        self.has_key = bool(self._key)
        self._closed = threading.Event()
        self._lock = threading.RLock()
        self._heard = self._checked = self._doubted = time.monotonic()
        self._checker: int | None = None
        self._told = False

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        read: Callable[[Any], T] = lambda answer: answer,
        final: Sequence[int] = (),
    ) -> T:
        """Ask until there is a right answer, or waiting is in vain.

        Args:
            method: of HTTP.
            path: below the address.
            body: sent as JSON.
            read: turns parsed JSON into the result, or raises :class:`BadAnswerError`.
            final: status codes that another attempt would not change, besides the usual ones.

        Raises:
            Refusal: the server refuses the request.
            ServerError: it was away for longer than ``patience``, or its answers are wrong.
        """
        heard = self._heard
        if time.monotonic() - heard > _QUIET_S:
            self._check_since(heard)
        gives_up: float | None = None
        pause, wrong = _FIRST_PAUSE_S, 0
        while True:
            try:
                answer = self._once(method, path, body, final)
                result = read(answer)
            except BadAnswerError as error:
                wrong += 1
                if wrong == _ANSWERS:
                    raise ServerError(
                        self._clean(
                            f"{self.address}{path}: {error}, {_ANSWERS} times; nothing was learned "
                            "from it"
                        )
                    ) from error
                problem, wait = f"answers wrongly ({error})", 0.0
            except _AwayError as error:
                problem, wait = str(error), error.wait
            else:
                self._check_since(self._doubted)
                self._heard, self._told = time.monotonic(), False
                return result
            now = self._doubted = time.monotonic()
            gives_up = now + self._patience if gives_up is None else gives_up
            if now >= gives_up:
                raise ServerError(
                    self._clean(
                        f"{self.address} {problem}; it was waited for {self._patience:g} s "
                        "(served.patience)"
                    )
                )
            pause = min(_LONGEST_PAUSE_S, 2 * pause)
            self._tell(self._clean(problem))
            if self._closed.wait(min(max(wait, pause), gives_up - now)):
                raise ServerError(self._clean(f"{self.address} {problem}"))

    def result_of(self, future: Future[T]) -> T:
        """Wait for an answer, unless the run is to end.

        Args:
            future: of a request in another thread.

        Raises:
            ServerError: the run is to end, or as :meth:`ask`.
        """
        while not wait([future], _LOOKS_EVERY_S).done:
            if self.stopping():
                raise ServerError(f"{self.address} was still answering")
        return future.result()

    def close(self) -> None:
        """End every request: those that wait for the server give up."""
        self._closed.set()
        self._http.close()

    def _once(self, method: str, path: str, body: Any, final: Sequence[int]) -> Any:
        """Ask once.

        Raises:
            BadAnswerError: the answer is not JSON.
            _AwayError: another attempt may succeed.
            Refusal: none would.
        """
        try:
            response = self._http.request(
                method, path, json=body, extensions={"trace": self._note_connection}
            )
        except httpx2.DecodingError as error:
            raise BadAnswerError(f"the answer cannot be unpacked ({_reason(error)})") from error
        except httpx2.TimeoutException as error:
            raise _AwayError(
                f"does not answer within {self._timeout:g} s (served.timeout)"
            ) from error
        except httpx2.TransportError as error:
            if "certificate" in str(error).lower():
                raise Refusal(
                    f"{self.address}: {_reason(error)}; kdrun trusts the certificates that this "
                    "system trusts: add the server's authority to them, or use a tunnel",
                    0,
                ) from error
            if "wrong_version_number" in str(error).lower():
                raise Refusal(
                    f"{self.address} does not speak https; write http:// instead", 0
                ) from error
            raise _AwayError(f"cannot be reached ({_reason(error)})") from error
        status = response.status_code
        if status in _BUSY and status not in final:
            raise _AwayError(
                f"is not ready (status {status})", _seconds(response.headers.get("retry-after"))
            )
        if response.is_redirect:
            target = self._clean(response.headers.get("location", "nowhere"))[:_SHOWN]
            raise Refusal(
                f"{self.address}{path} redirects to {target}, which is not followed; give that "
                "address instead",
                status,
            )
        if not response.is_success:
            said = self._clean(_said(response.text))[:_SHOWN] or "no reason given"
            raise Refusal(
                f"{self.address}{path} refuses (status {status}): {said}{_HINTS.get(status, '')}",
                status,
            )
        try:
            return json.loads(response.content) if response.content else None
        except (ValueError, RecursionError) as error:
            raise BadAnswerError("the answer is cut off or no JSON") from error

    def _note_connection(self, event: str, _: object) -> None:
        """Doubt every answer from now on, since another thread may use the connection first."""
        if event == "connection.connect_tcp.complete" and self._checker != threading.get_ident():
            self._doubted = time.monotonic()

    def _check_since(self, moment: float) -> None:
        """Check that the server is the one that it was, unless that was done since a moment.

        Other threads wait for the check, so that they use no answer of another server.
        """
        with self._lock:
            if self._checker is not None or self._checked >= moment:  # a check itself needs none
                return
            began, self._checker = time.monotonic(), threading.get_ident()
            try:
                self.after_absence()
            finally:
                self._checker = None
            self._checked = began

    def _clean(self, text: str) -> str:
        """Return one printable line without the key, which a server may repeat."""
        hidden = text if not self._key else text.replace(self._key, "***")
        return " ".join("".join(c if c.isprintable() else " " for c in hidden).split())

    def _tell(self, problem: str) -> None:
        with self._lock:
            if not self._told:
                self._told = True
                self._say(
                    f"{self.address} {problem}; asking again for {self._patience:g} s "
                    "(served.patience)"
                )


class _AwayError(Exception):
    """A server did not answer, but may do so later.

    Args:
        message: what happened, to follow the address.
        wait: seconds that it asks to wait.
    """

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


def _seconds(value: str | None) -> float:
    """Read a ``Retry-After`` in seconds; dates are rare and taken as none."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        return 0.0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _said(text: str) -> str:
    """Return the reason in a server's refusal."""
    try:
        found = json.loads(text)
        said = found.get("error", found)
        return str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError, RecursionError):
        return text


def _read_key() -> str:
    """Read the server's key from the environment.

    Raises:
        InputError: it cannot be sent; the line does not show it.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"{KEY} has characters that a key cannot have, such as a line break or a letter with "
            "an accent; set it again"
        )
    return key
