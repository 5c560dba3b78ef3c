"""A small inference server with vLLM's interface and a real tiny model; it misbehaves on demand.

``python pretend.py MODEL_FOLDER PORT`` is one in a process of its own, which can be killed.
"""

from __future__ import annotations

import json
import math
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

COMPLETIONS = "/v1/completions"


class Model:
    """A model and its tokenizer, in float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return int(self.model.config.vocab_size)

    def run(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of each position, and states before the final norm."""
        seen: list[torch.Tensor] = []
        with self._lock, torch.no_grad():
            hook = self.model.model.norm.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0])
            )
            try:
                logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
            finally:
                hook.remove()
        return logits, seen[0][0]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer.

    Attributes:
        kind: ``status``, ``hang``, ``close``, ``cut`` (half of the JSON), ``broken`` (the
            connection ends within the answer), ``text``, ``json`` (another document), ``nan``,
            ``few``, ``foreign`` (a token outside the vocabulary), ``positions``, ``mass``,
            ``no_scores``, ``redirect``; with states ``other_ids``, ``nan_states``, ``no_file``,
            ``failed``, ``outside``, ``short_states``, ``cut_file``, ``no_states``.
        value: status, seconds, address or document.
        retry_after: seconds for the header.
        path: of the requests that it concerns.
    """

    kind: str
    value: Any = None
    retry_after: str | None = None
    path: str = COMPLETIONS


@dataclass(frozen=True)
class Request:
    """A request that was received."""

    path: str
    headers: dict[str, str]
    body: Any = None

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.body["prompt"])


@dataclass
class Pretend:
    """A server in threads of this process.

    Attributes:
        model: what it has.
        states: folder for hidden states; None has no such service.
        max_logprobs: most entries of a position.
        max_length: tokens of its context.
        key: that it demands.
        softens: whether log-probabilities follow the temperature.
        tokenizes: whether it has ``/tokenize``.
        names: of its models.
        certificate: file with key and certificate, for https.
        port: 0 takes a free one.
        faults: played for the next requests that they concern.
        forever: played for every request after those.
        spared: rows to train on, or evaluate, that are answered before any fault is played.
        spares_probe: whether the first prompt of all is always answered.
        requests: all that were received.
    """

    model: Model
    states: Path | None = None
    max_logprobs: int = 128
    max_length: int = 256
    key: str | None = None
    softens: bool = False
    tokenizes: bool = True
    names: tuple[str, ...] = ("tiny",)
    certificate: Path | None = None
    port: int = 0
    faults: deque[Fault] = field(default_factory=deque)
    forever: Fault | None = None
    spared: int = 0
    spares_probe: bool = False
    requests: list[Request] = field(default_factory=list)
    _open: set[socket.socket] = field(default_factory=set)
    _lock: Any = field(default_factory=threading.Lock)
    _released: threading.Event = field(default_factory=threading.Event)
    _probe: tuple[int, ...] | None = None
    _files: int = 0
    _http: Any = None

    def __post_init__(self) -> None:
        self.start()

    @property
    def address(self) -> str:
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}"

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The prompts that were asked for and are not the probe, in their order."""
        found = [one for one in self.requests if one.path == COMPLETIONS and one.body]
        return [one.prompt for one in found if one.prompt != self._probe]

    def start(self) -> None:
        """Listen; also again after an end."""
        self._released.clear()
        self._http = _Server(("127.0.0.1", self.port), _Handler)
        self._http.pretend = self
        if self.certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """End as a killed process does: nobody listens, and connections break."""
        if self._http is None:
            return
        self._released.set()
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def begin(
        self,
        *faults: Fault,
        forever: Fault | None = None,
        spared: int = 0,
        spares_probe: bool = False,
    ) -> None:
        """Play faults, after so many more rows."""
        with self._lock:
            self.faults, self.forever = deque(faults), forever
            self.spared, self.spares_probe = spared, spares_probe

    def heal(self) -> None:
        """Play no more faults, and end what hangs."""
        self.begin()
        self._released.set()

    def fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            if request.path == COMPLETIONS and request.body:
                self._probe = self._probe or request.prompt
                if request.prompt == self._probe:
                    if self.spares_probe:
                        return None
                elif self.spared > 0:
                    self.spared -= 1
                    return None
            if self.spared > 0:
                return None
            if self.faults and self.faults[0].path == request.path:
                return self.faults.popleft()
            if not self.faults and self.forever and self.forever.path == request.path:
                return self.forever
            return None

    def answer(self, request: Request, fault: Fault | None) -> tuple[int, Any]:
        """A status and a document."""
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return 401, {"error": {"message": "Unauthorized", "type": "auth", "code": 401}}
        if request.path == "/v1/models":
            root, length = str(self.model.folder), self.max_length
            return 200, {
                "object": "list",
                "data": [
                    {"id": name, "root": root, "max_model_len": length} for name in self.names
                ],
            }
        if request.path == "/tokenize" and self.tokenizes:
            ids = self.model.tokenizer(request.body["prompt"], add_special_tokens=False)
            return 200, {"tokens": ids["input_ids"], "count": len(ids["input_ids"])}
        if request.path == COMPLETIONS:
            return self._complete(request.body, fault)
        return 404, {"detail": "Not Found"}

    def _complete(self, body: dict[str, Any], fault: Fault | None) -> tuple[int, Any]:
        ids, k = body["prompt"], body.get("prompt_logprobs")
        if body["model"] not in self.names:
            return _refuse(404, f"The model `{body['model']}` does not exist.")
        if len(ids) + body["max_tokens"] > self.max_length:
            return _refuse(
                400,
                f"This model's maximum context length is {self.max_length} tokens. However, you "
                f"requested {body['max_tokens']} output tokens and your prompt contains {len(ids)} "
                "input tokens.",
            )
        if k is not None and k > self.max_logprobs:
            return _refuse(
                400,
                f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                f"{self.max_logprobs} (parameter=prompt_logprobs, value={k})",
            )
        logits, states = self.model.run(ids)
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None}
        choice |= {"finish_reason": "length", "prompt_logprobs": None}
        answer: dict[str, Any] = {"id": "cmpl-1", "model": body["model"], "choices": [choice]}
        kind = None if fault is None else fault.kind
        if k is not None:
            temperature = (body.get("temperature") or 1.0) if self.softens else 1.0
            scores = self._scores(ids, logits / temperature, k)
            _spoil(scores, kind, self.model.size)
            choice["prompt_logprobs"] = None if kind == "no_scores" else scores
        wanted = (body.get("kv_transfer_params") or {}).get("kdrun")
        if wanted is not None and self.states is not None and kind != "no_states":
            path = self._keep(ids, states[wanted["first"] :], kind)
            answer["kv_transfer_params"] = {"hidden_states_path": path}
        return 200, answer

    def _scores(self, ids: Sequence[int], logits: torch.Tensor, k: int) -> list[Any]:
        log_probs = logits.log_softmax(-1)
        entries: list[Any] = [None]
        for position in range(len(ids) - 1):
            own, row = ids[position + 1], log_probs[position]
            rank = int((row >= row[own]).sum())
            found = {own: (float(row[own]), rank)}
            top = row.topk(k)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            found |= {token: (value, place) for place, (token, value) in enumerate(pairs, 1)}
            entries.append(
                {
                    str(token): {
                        "logprob": max(value, -9999.0),
                        "rank": place,
                        "decoded_token": self.model.tokenizer.decode([token]),
                    }
                    for token, (value, place) in found.items()
                }
            )
        return entries

    def _keep(self, ids: Sequence[int], states: torch.Tensor, kind: str | None) -> str:
        assert self.states is not None
        self.states.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._lock:
            self._files += 1
            path = self.states / f"cmpl-{self._files}-0.safetensors"
        if kind == "failed":
            path.with_name(path.name + ".failed").write_text("No space left on device")
        if kind in ("no_file", "failed"):
            return str(path)
        ids = [*ids[:-1], ids[-1] ^ 1] if kind == "other_ids" else list(ids)
        if kind == "nan_states":
            states = states.clone()
            states[-1, 0] = math.nan
        if kind == "short_states":
            states = states[1:]
        partial = path.with_name(path.name + ".partial")
        save_file({"states": states.contiguous(), "token_ids": torch.tensor(ids)}, partial)
        if kind == "cut_file":
            partial.write_bytes(partial.read_bytes()[:-9])
        partial.replace(path)
        if kind == "outside":  # a file beside the folder, which no answer may name
            outside = self.states.parent / "outside.safetensors"
            path.replace(outside)
            return f"{self.states}/../{outside.name}"
        return str(path)


def _refuse(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "type": "BadRequestError", "code": status}}


def _spoil(scores: list[Any], kind: str | None, size: int) -> None:
    """Make scores wrong, in their last position."""
    last = scores[-1]
    first = min(last, key=lambda token: last[token]["rank"])
    if kind == "nan":
        last[first]["logprob"] = math.nan
    elif kind == "few":
        del last[first]
    elif kind == "foreign":
        last[str(size)] = last.pop(first)
    elif kind == "positions":
        scores.pop()
    elif kind == "mass":
        for entry in last.values():
            entry["logprob"] = -0.05


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64
    pretend: Pretend

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or does not trust the certificate, is none of ours."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.pretend._open.add(self.connection)

    def finish(self) -> None:
        self.server.pretend._open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        self._serve(json.loads(content) if content else None)

    def _serve(self, body: Any) -> None:
        pretend = self.server.pretend
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, body)
        fault = pretend.fault_of(request)
        kind = None if fault is None else fault.kind
        if kind == "hang":
            pretend._released.wait(60 if fault is None or fault.value is None else fault.value)
        if kind in ("hang", "close"):
            self.close_connection = True
            return
        if fault is not None and kind == "status":
            more = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self._send(int(fault.value), b'{"error": {"message": "not now"}}', more)
            return
        if fault is not None and kind == "redirect":
            self._send(307, b"", {"Location": str(fault.value) + self.path})
            return
        status, answer = pretend.answer(request, fault)
        content = json.dumps(answer).encode()
        if fault is not None and kind == "text":
            content = str(fault.value).encode()
        if fault is not None and kind == "json":
            content = json.dumps(fault.value).encode()
        if kind == "cut":
            content = content[: len(content) // 2]
        self._send(status, content, {}, len(content) // 2 if kind == "broken" else None)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], only: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self._headers_buffer.append(b"\r\n" + content[:only])  # type: ignore[attr-defined]
        with suppress(OSError):
            self.flush_headers()
        self.close_connection |= only is not None


if __name__ == "__main__":
    served = Pretend(Model(Path(sys.argv[1])), port=int(sys.argv[2]))
    print(served.address, flush=True)
    threading.Event().wait()
