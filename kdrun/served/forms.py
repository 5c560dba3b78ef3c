"""The two forms in which a server gives a teacher, each checked against a row of its own scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kdrun.errors import InputError
from kdrun.paths import expand_home
from kdrun.served.client import Refusal
from kdrun.served.engine import Engine, Offer
from kdrun.served.head import Head, load_head
from kdrun.served.states import FOLDER
from kdrun.served.teacher import Asked

if TYPE_CHECKING:
    from torch import Tensor

    from kdrun.config.sections import ModelConfig
    from kdrun.config.served_section import ServedConfig

_AGREE = {"torch.float32": 1e-3}
_AGREE_16_BITS = 0.15
"""A server in 16 bits rounds its logits, which are as large as 30, to a 16th or an 8th."""
_GIB = 2**30
Scored = tuple["Tensor", "Tensor", "Tensor"]
"""Log-probabilities, tokens and tails, as :func:`kdrun.served.scores.read_scores` returns them."""


def score_probe(
    engine: Engine, offer: Offer, ids: Sequence[int], k: int, vocab_size: int
) -> Scored:
    """Return the log-probabilities of the probe.

    Raises:
        InputError: the server does not give so many entries; names its flag.
    """
    try:
        return engine.score(offer.name, ids, range(len(ids) - 1), k, vocab_size)
    except Refusal as error:
        if error.status == 400 and "logprobs" in str(error):
            raise InputError(
                f"served.top_k={k}: {error}; start the server with --max-logprobs {k}, or pass "
                "--set served.top_k=N with a smaller N"
            ) from error
        raise


def try_states(
    engine: Engine, served: ServedConfig, offer: Offer, ids: Sequence[int]
) -> Tensor | None:
    """Return the states of the probe; None if the server has none and none are demanded."""
    folder = _folder(served)
    found = engine.states(offer.name, ids, 0, folder, served.timeout)
    if found is None and served.form == "states":
        raise InputError(
            f"served.form=states: {engine.client.address} gives no hidden states; start it with "
            "the connector that 'kdrun served connector' writes"
        )
    return found


def _folder(served: ServedConfig) -> Path:
    return Path(FOLDER) if served.folder is None else expand_home(served.folder)


def by_states(
    base: Asked,
    states: Tensor,
    scored: Scored,
    model: ModelConfig,
    served: ServedConfig,
    offer: Offer,
    max_length: int,
    processes: int,
) -> Asked:
    """Read the norm and head, and check that they make the server's own log-probabilities.

    Args:
        base: what is asked in either form.
        states: of the probe.
        scored: the server's own log-probabilities of it.
        model: section with the type of the head.
        served: section of the server.
        offer: names the model that the server loaded.
        max_length: longest row.
        processes: of the run, which share ``served.space``.

    Raises:
        InputError: they do not agree, or a row does not fit into the space.
    """
    name = served.head or offer.root
    if name is None:
        raise InputError(
            "served.head: the server does not say which model it has; name its folder or hub id"
        )
    head = load_head(name, model.trust_remote_code)
    if len(head.weight) < base.vocab_size:
        raise InputError(
            f"served.head: {name} has {len(head.weight)} tokens, and the student has "
            f"{base.vocab_size}; teacher and student must share a tokenizer"
        )
    if states.shape[-1] != head.weight.shape[1]:
        raise InputError(
            f"served.head: {name} has states of width {head.weight.shape[1]}, and the server gives "
            f"{states.shape[-1]}; name the model that the server has"
        )
    off = _disagreement(head, states, scored)
    allowed = _AGREE.get(str(states.dtype), _AGREE_16_BITS)
    if not off <= allowed:
        raise InputError(
            f"served.form=states: log-probabilities from the states, and norm and head of {name}, "
            f"differ by {off:.2g} from the server's own (at most {allowed:g} is rounding); name "
            "the model that the server has with served.head, or use --set served.form=top_k"
        )
    one = states.shape[-1] * states.element_size()
    space = int(served.space * _GIB / processes)
    if max_length * one > space:
        raise InputError(
            f"served.space={served.space:g}: a row of {max_length} tokens takes "
            f"{max_length * one / _GIB:.2g} GiB of states; raise it, or lower --max-length"
        )
    return replace(base, head=head, folder=_folder(served), state_bytes=one, space=space)


def _disagreement(head: Head, states: Tensor, scored: Scored) -> float:
    """Return the largest difference between log-probabilities from states and the server's own."""
    import torch

    log_probs, indices, _ = scored
    logits = torch.nn.functional.linear(head.normed(states[:-1]), head.weight, head.bias)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    own = logits.log_softmax(-1).gather(-1, indices)
    return float((own - log_probs).abs().max())


def by_top_k(base: Asked, served: ServedConfig, ids: Sequence[int], temperature: float) -> Asked:
    """Check that the server gives so many entries, and at the loss's temperature.

    Args:
        base: what is asked in either form.
        served: section of the server.
        ids: the probe.
        temperature: of the loss.

    Raises:
        InputError: it does not.
    """
    engine, size = base.engine, base.vocab_size
    if served.top_k > size:
        raise InputError(f"served.top_k={served.top_k}: the vocabulary has {size} tokens")
    offer = Offer(base.model)
    plain = score_probe(engine, offer, ids, served.top_k, size)
    if temperature != 1.0:
        softened = engine.score(
            offer.name, ids, range(len(ids) - 1), served.top_k, size, temperature
        )
        if not _is_softened(plain, softened, temperature):
            raise InputError(
                f"loss.temperature={temperature:g}: {engine.client.address} gives "
                "log-probabilities at temperature 1, whatever is asked; use its hidden states "
                "(served.form=states), a server that softens prompts before it takes the top k "
                "(--logprobs-mode processed_logprobs), or --temperature 1"
            )
    return replace(base, top_k=served.top_k, temperature=temperature)


def _is_softened(plain: Sequence[Tensor], softened: Sequence[Tensor], temperature: float) -> bool:
    """Return whether differences of log-probabilities shrank by the temperature."""
    import torch

    if not torch.equal(plain[1][:, :2], softened[1][:, :2]):
        return False
    before, after = (found[0][:, 0] - found[0][:, 1] for found in (plain, softened))
    return bool(torch.allclose(after * temperature, before, rtol=1e-2, atol=1e-2))
