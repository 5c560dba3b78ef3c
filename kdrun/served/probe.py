"""What is found out about a server before anything heavy: what it has, and that it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.models.address import KEY, clean_address, is_loopback
from kdrun.models.locate import locate_model
from kdrun.models.tokenizers import compare_tokenizers, load_tokenizer
from kdrun.served.client import Client, ServerError
from kdrun.served.engine import VLLM, Engine, Offer
from kdrun.served.forms import by_states, by_top_k, score_probe, try_states
from kdrun.served.teacher import Asked, ServedTeacher
from kdrun.served.writer import PROBE, ServedWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.sections import ModelConfig
    from kdrun.config.served_section import ServedConfig

_PROBED = 5
_SAME = 0.05
"""Mean difference of log-probabilities of the probe that a restarted server may show."""
_TOGETHER = 64
_ROWS, _CHARACTERS = 8, 2000


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
            scored = score_probe(engine, offer, ids, _PROBED, vocab_size)
            asked = Asked(
                engine=engine,
                model=offer.name,
                vocab_size=vocab_size,
                timeout=served.timeout,
                concurrency=max(1, served.concurrency // processes),
                probe=tuple(scored[0].flatten().tolist()),
            )
            states = None
            if served.form != "top_k":
                states = try_states(engine, served, offer, ids)
            if states is None:
                asked = by_top_k(asked, served, ids, temperature)
            else:
                asked = by_states(
                    asked, states, scored, model, served, offer, max_length, processes
                )
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
