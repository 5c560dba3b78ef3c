"""What is found out about a server before anything heavy: what it has, and that it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.address import KEY, clean_address, is_loopback
from kdrun.models.locate import locate_model
from kdrun.models.tokenizers import compare_tokenizers, load_tokenizer
from kdrun.paths import expand_home
from kdrun.served.client import Client, Refusal, ServerError
from kdrun.served.engine import VLLM, Engine, Offer
from kdrun.served.head import Head, load_head
from kdrun.served.states import FOLDER
from kdrun.served.teacher import Asked, ServedTeacher
from kdrun.served.writer import PROBE, ServedWriter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.sections import ModelConfig
    from kdrun.config.served_section import ServedConfig

_PROBED = 5
_AGREE = {"torch.float32": 1e-3}
_AGREE_16_BITS = 0.15
"""A server in 16 bits rounds its logits, which are as large as 30, to a 16th or an 8th."""
_SAME = 0.05
"""Mean difference of log-probabilities of the probe that a restarted server may show."""
_TOGETHER = 64
_ROWS, _CHARACTERS = 8, 2000
_GIB = 2**30


def greet(model: ModelConfig, served: ServedConfig, max_length: int, say: Say) -> None:
    """Check that a server answers, has the model, and takes rows of the run's length.

    Args:
        model: section with the address of the teacher.
        served: section of the server.
        max_length: longest row.
        say: called with a line where there is something to know.

    Raises:
        InputError: what is wrong, in one line.
    """
    engine = _connect(str(model.teacher), "model.teacher", served, say)
    try:
        with _at_the_start():
            _choose(engine, served.model, max_length)
    finally:
        engine.client.close()


def open_served(
    model: ModelConfig,
    served: ServedConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    rows: Sequence[Sequence[int]],
    max_length: int,
    temperature: float,
    processes: int,
    say: Say,
) -> ServedTeacher:
    """Find out what a server gives, check it, and return the teacher.

    Args:
        model: section with the address of the teacher, and the type of its head.
        served: section of the server.
        tokenizer: the student's.
        vocab_size: tokens that teacher and student share.
        rows: token ids of some training rows, which the server must tokenise alike.
        max_length: longest row.
        temperature: of the loss.
        processes: of the run, which share ``served.concurrency``.
        say: called with lines to print.

    Raises:
        InputError: what is wrong, in one line.
    """
    engine = _connect(str(model.teacher), "model.teacher", served, say)
    try:
        with _at_the_start():
            offer = _choose(engine, served.model, max_length)
            _compare_tokenizers(engine, served, tokenizer, rows, model.trust_remote_code)
            ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
            scored = _scores(engine, offer, ids, _PROBED, vocab_size)
            concurrency = max(1, served.concurrency // processes)
            common: dict[str, Any] = {
                "engine": engine,
                "model": offer.name,
                "vocab_size": vocab_size,
                "timeout": served.timeout,
                "concurrency": concurrency,
                "probe": tuple(scored[0].flatten().tolist()),
            }
            states = None
            if served.form != "top_k":
                states = _try_states(engine, served, offer, ids)
            if states is not None:
                asked = _by_states(
                    states, scored, model, served, offer, max_length, processes, common
                )
            else:
                asked = _by_top_k(served, ids, temperature, common)
    except BaseException:
        engine.client.close()
        raise
    engine.client.after_absence = lambda: check_same(asked, ids)
    return ServedTeacher(asked)


def open_writer(
    address: str,
    key: str,
    served: ServedConfig,
    max_length: int,
    vocab_size: int,
    processes: int,
    say: Say,
) -> ServedWriter:
    """Return a server that writes text, once it is known to answer.

    Args:
        address: of the server.
        key: key of the configuration that gives it.
        served: section of the server.
        max_length: tokens of prompt and answer.
        vocab_size: tokens that the run knows.
        processes: of the run, which share ``served.concurrency``.
        say: called with lines to print.

    Raises:
        InputError: what is wrong, in one line.
    """
    engine = _connect(address, key, served, say)
    named = served.model if key == "model.teacher" else None
    with _at_the_start():
        offer = _choose(engine, named, max_length)
    return ServedWriter(engine, offer.name, max(1, served.concurrency // processes), vocab_size)


def check_same(asked: Asked, ids: Sequence[int]) -> None:
    """Refuse a server that now has another model than before it was away.

    Args:
        asked: has the log-probabilities of the probe at the beginning.
        ids: the probe.

    Raises:
        ServerError: it is another.
    """
    positions = range(len(ids) - 1)
    now = asked.engine.score(asked.model, ids, positions, _PROBED, asked.vocab_size)[0]
    if differs(asked.probe, now.flatten().tolist()):
        raise ServerError(
            f"{asked.engine.client.address} has another model than before: its log-probabilities "
            "have changed; start the server with the model that the run began with"
        )


def differs(before: Sequence[float], now: Sequence[float]) -> bool:
    """Return whether two probes are of different models, rounding aside."""
    pairs = zip(before, now, strict=True)
    return len(before) != len(now) or sum(abs(a - b) for a, b in pairs) > _SAME * len(before)


Say = Callable[[str], None]


def _connect(given: str, key: str, served: ServedConfig, say: Say) -> Engine:
    address = clean_address(given, key)
    client = Client(address, served.timeout, served.patience, say)
    if client.has_key and address.startswith("http:") and not is_loopback(address):
        say(f"{KEY} is sent to {address} unencrypted; use https, or a tunnel")
    return VLLM(client)


@contextmanager
def _at_the_start() -> Iterator[None]:
    """Turn a server's failure into wrong input: nothing was begun.

    Raises:
        InputError: instead of the failure.
    """
    try:
        yield
    except ServerError as error:
        raise InputError(str(error)) from error


def _choose(engine: Engine, named: str | None, max_length: int) -> Offer:
    """Return the model that is asked for."""
    address = engine.client.address
    offers = engine.offers()
    names = ", ".join(offer.name for offer in offers[:5]) or "none"
    if named is None and len(offers) != 1:
        raise InputError(
            f"{address} has {len(offers)} models ({names}); choose one with --set served.model=NAME"
        )
    found = [offer for offer in offers if named in (None, offer.name)]
    if not found:
        raise InputError(f"served.model={named}: {address} has {names}")
    (offer,) = found[:1]
    if offer.max_length is not None and offer.max_length < max_length + 1:
        raise InputError(
            f"data.max_length={max_length}: {address} takes {offer.max_length} tokens, and a row "
            f"needs one more than its own; start it with --max-model-len {max_length + 1}, or pass "
            f"--max-length {offer.max_length - 1}"
        )
    return offer


def _compare_tokenizers(
    engine: Engine,
    served: ServedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    trust_remote_code: bool,
) -> None:
    """Compare the server's tokens with the student's: all special ones, and some rows."""
    address = engine.client.address
    if served.tokenizer is not None:
        given = load_tokenizer(locate_model(served.tokenizer), trust_remote_code=trust_remote_code)
        compare_tokenizers(given, tokenizer)
        return
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    texts = [
        "".join(special[start : start + _TOGETHER]) for start in range(0, len(special), _TOGETHER)
    ]
    texts += [str(tokenizer.decode(row))[:_CHARACTERS] for row in rows[:_ROWS]]
    for text in texts:
        theirs = engine.tokenize(text)
        if theirs is None:
            raise InputError(
                f"{address} cannot tokenise; name the teacher's tokenizer with --set "
                "served.tokenizer=FOLDER"
            )
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if theirs != ours:
            raise InputError(_other_tokens(address, tokenizer, ours, theirs))


def _other_tokens(address: str, tokenizer: Any, ours: Sequence[int], theirs: Sequence[int]) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    before = tokenizer.decode(ours[max(0, place - 5) : place])
    shown = ["nothing" if place >= len(ids) else f"{ids[place]}" for ids in (ours, theirs)]
    token = "" if place >= len(ours) else f" ({tokenizer.convert_ids_to_tokens(ours[place])!r})"
    return (
        f"{address} tokenises differently from the student: after {before!r} the student has token "
        f"{shown[0]}{token}, and the server {shown[1]}; teacher and student must share a tokenizer"
    )


def _scores(
    engine: Engine, offer: Offer, ids: Sequence[int], k: int, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return engine.score(offer.name, ids, range(len(ids) - 1), k, vocab_size)
    except Refusal as error:
        if error.status == 400 and "logprobs" in str(error):
            raise InputError(
                f"served.top_k={k}: {error}; start the server with --max-logprobs {k}, or pass "
                "--set served.top_k=N with a smaller N"
            ) from error
        raise


def _try_states(
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


def _by_states(
    states: Tensor,
    scored: tuple[Tensor, Tensor, Tensor],
    model: ModelConfig,
    served: ServedConfig,
    offer: Offer,
    max_length: int,
    processes: int,
    common: dict[str, Any],
) -> Asked:
    name = served.head or offer.root
    if name is None:
        raise InputError(
            "served.head: the server does not say which model it has; name its folder or hub id"
        )
    head = load_head(name, model.trust_remote_code)
    if len(head.weight) < common["vocab_size"]:
        raise InputError(
            f"served.head: {name} has {len(head.weight)} tokens, and the student has "
            f"{common['vocab_size']}; teacher and student must share a tokenizer"
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
    return Asked(**common, head=head, folder=_folder(served), state_bytes=one, space=space)


def _disagreement(head: Head, states: Tensor, scored: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the largest difference between log-probabilities from states and the server's own."""
    import torch

    log_probs, indices, _ = scored
    logits = torch.nn.functional.linear(head.normed(states[:-1]), head.weight, head.bias)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * (logits / head.softcap).tanh()
    own = logits.log_softmax(-1).gather(-1, indices)
    return float((own - log_probs).abs().max())


def _by_top_k(
    served: ServedConfig, ids: Sequence[int], temperature: float, common: dict[str, Any]
) -> Asked:
    """Check that the server gives so many entries, and at the loss's temperature."""
    engine, size = common["engine"], common["vocab_size"]
    if served.top_k > size:
        raise InputError(f"served.top_k={served.top_k}: the vocabulary has {size} tokens")
    offer = Offer(common["model"])
    plain = _scores(engine, offer, ids, served.top_k, size)
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
    return Asked(**common, top_k=served.top_k, temperature=temperature)


def _is_softened(plain: Sequence[Tensor], softened: Sequence[Tensor], temperature: float) -> bool:
    """Return whether differences of log-probabilities shrank by the temperature."""
    import torch

    if not torch.equal(plain[1][:, :2], softened[1][:, :2]):
        return False
    before, after = (found[0][:, 0] - found[0][:, 1] for found in (plain, softened))
    return bool(torch.allclose(after * temperature, before, rtol=1e-2, atol=1e-2))
