"""What kdrun asks of an inference server, in vLLM's dialect of OpenAI's interface.

Another engine is another class with these methods; nothing else knows paths or fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kdrun.served.client import BadAnswerError, Client, Refusal
from kdrun.served.scores import read_scores
from kdrun.served.states import read_states

if TYPE_CHECKING:
    from torch import Tensor

_COMPLETIONS, _CALL = "/v1/completions", "/collective_rpc"


@dataclass(frozen=True)
class Offer:
    """A model that a server has.

    Attributes:
        name: by which it is asked for.
        root: the folder or hub id that the server loaded it from, if it says so.
        max_length: tokens of its context, if the server says so.
    """

    name: str
    root: str | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class Answer:
    """Text that a server wrote.

    Attributes:
        tokens: drawn tokens, the end token included.
        log_probs: of each under the distribution that it was drawn from.
    """

    tokens: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely token.
        top_p: smallest mass of the tokens drawn from.
        top_k: most tokens drawn from; 0 is no limit.
        stops: tokens that end an answer.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stops: tuple[int, ...]


class Engine(Protocol):
    """One model of one server."""

    client: Client

    def offers(self) -> list[Offer]:
        """Return the models that the server has."""

    def tokenize(self, text: str) -> list[int] | None:
        """Return the tokens of a text, without any that a template adds; None if it cannot."""

    def score(
        self,
        model: str,
        ids: Sequence[int],
        positions: Sequence[int],
        k: int,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the most likely tokens of positions, as ``read_scores`` does."""

    def states(
        self, model: str, ids: Sequence[int], first: int, folder: Path, timeout: float
    ) -> Tensor | None:
        """Return the last hidden states from a token on; None if the server has no such service."""

    def write(self, model: str, prompt: Sequence[int], drawing: Drawing, seed: int) -> Answer:
        """Return a continuation of a prompt."""

    def take_in(self, folder: Path) -> None:
        """Replace the weights of the server's model by those of a folder that it sees."""


class VLLM:
    """vLLM's server.

    Args:
        client: asks it.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._has_extension = True

    def offers(self) -> list[Offer]:
        """Return the models that the server has."""

        def read(answer: Any) -> list[Offer]:
            try:
                return [_offer(one) for one in answer["data"]]
            except (KeyError, TypeError, AttributeError) as error:
                raise BadAnswerError("it does not list its models") from error

        return self.client.ask("GET", "/v1/models", read=read)

    def tokenize(self, text: str) -> list[int] | None:
        """Return the tokens of a text; None if the server cannot tokenise."""

        def read(answer: Any) -> list[int]:
            try:
                return [int(token) for token in answer["tokens"]]
            except (KeyError, TypeError, ValueError) as error:
                raise BadAnswerError("it gives no tokens of a text") from error

        body = {"prompt": text, "add_special_tokens": False}
        try:
            return self.client.ask("POST", "/tokenize", body, read)
        except Refusal as error:
            if error.status in (404, 405, 501):
                return None
            raise

    def score(
        self,
        model: str,
        ids: Sequence[int],
        positions: Sequence[int],
        k: int,
        vocab_size: int,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the most likely tokens of positions, as ``read_scores`` does."""
        body = _body(model, ids, prompt_logprobs=k, temperature=temperature)
        return self.client.ask(
            "POST",
            _COMPLETIONS,
            body,
            lambda answer: read_scores(answer, ids, positions, k, vocab_size),
        )

    def states(
        self, model: str, ids: Sequence[int], first: int, folder: Path, timeout: float
    ) -> Tensor | None:
        """Return the last hidden states from a token on, by kdrun's connector."""
        body = _body(model, ids, temperature=0, kv_transfer_params={"kdrun": {"first": first}})

        def read(answer: Any) -> Tensor | None:
            given = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
            path = given.get("hidden_states_path") if isinstance(given, dict) else None
            return None if path is None else read_states(folder, path, ids, first, timeout)

        return self.client.ask("POST", _COMPLETIONS, body, read)

    def write(self, model: str, prompt: Sequence[int], drawing: Drawing, seed: int) -> Answer:
        """Return a continuation of a prompt."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": drawing.max_new_tokens,
            "temperature": drawing.temperature,
            "top_p": drawing.top_p,
            "top_k": drawing.top_k or -1,
            # Not those of the model's own generation settings, which the server would take.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(drawing.stops),
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        return self.client.ask("POST", _COMPLETIONS, body, _read_answer)

    def take_in(self, folder: Path) -> None:
        """Load the weights of a folder, and forget answers of the former ones.

        By kdrun's extension of the workers where the server has it, else by vLLM's own method.
        """
        own = {"method": "kdrun_take_in", "kwargs": {"folder": str(folder)}}
        plain = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        if self._has_extension:
            try:
                self.client.ask("POST", _CALL, own, final=(500,))
            except Refusal as error:
                if "has no attribute" not in str(error):
                    raise
                self._has_extension = False
        if not self._has_extension:
            self.client.ask("POST", _CALL, plain, final=(500,))
        self.client.ask("POST", "/reset_prefix_cache", {})


def _body(model: str, ids: Sequence[int], **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": list(ids), "max_tokens": 1, **more}


def _offer(one: Any) -> Offer:
    root, length = one.get("root"), one.get("max_model_len")
    return Offer(
        str(one["id"]),
        root if isinstance(root, str) else None,
        length if isinstance(length, int) else None,
    )


def _read_answer(answer: Any) -> Answer:
    try:
        choice = answer["choices"][0]
        tokens = [int(token) for token in choice["token_ids"]]
        log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BadAnswerError("its text has no tokens with log-probabilities") from error
    if len(tokens) != len(log_probs) or not all(value <= 1e-3 for value in log_probs):
        raise BadAnswerError("the log-probabilities of its text are wrong")
    return Answer(tokens, log_probs)
