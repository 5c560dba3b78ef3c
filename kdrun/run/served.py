"""The teacher of a run where a server has it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from kdrun.cache.choose import ChosenTeacher, check_loss
from kdrun.data.collate import teacher_side
from kdrun.data.prepare import examples_in
from kdrun.errors import InputError
from kdrun.models.address import is_address
from kdrun.paths import expand_home, make_output_folder
from kdrun.procedures.base import Origin
from kdrun.run import folder as runs
from kdrun.served.client import ServerError
from kdrun.served.probe import open_served, open_writer
from kdrun.served.writer import ServedWriter, StudentWriter

if TYPE_CHECKING:
    from kdlosses import KDObjective
    from kdrun.config.sections import RunConfig
    from kdrun.procedures.session import Session
    from kdrun.run.prepare import Prepared
    from kdrun.run.start import Start
    from kdrun.served.teacher import ServedTeacher

_SHOWN = 8
"""Training rows that a server must tokenise as the student does."""


def choose_served(
    config: RunConfig, prepared: Prepared, objective: KDObjective, start: Start
) -> ChosenTeacher:
    """Open the server of a run's teacher, and check that it suits the run.

    Args:
        config: of the run.
        prepared: provides the pair and its examples.
        objective: that of the run, unchunked.
        start: provides the processes, and displays lines.

    Raises:
        InputError: the server does not have what the run needs.
    """
    pair, address = prepared.pair, str(config.model.teacher)
    rows = islice(examples_in(prepared.examples.train), _SHOWN)
    served = open_served(
        config.model,
        config.served,
        pair.tokenizer,
        pair.vocab_size,
        [teacher_side(one)["input_ids"] for one in rows],
        config.data.teacher_length,
        config.loss.temperature,
        start.world.size,
        start.say,
    )
    try:
        return _chosen(served, config, objective, address)
    except InputError:
        served.close()
        raise


def _chosen(
    served: ServedTeacher, config: RunConfig, objective: KDObjective, address: str
) -> ChosenTeacher:
    """Check that the loss can be computed with what a server gives."""
    if not served.exact and "temperature" in config.loss.schedules:
        raise InputError(
            f"{address} gives log-probabilities at one temperature, but loss.schedules changes it; "
            "use its hidden states (served.form=states)"
        )
    check_loss(served, objective, address)
    asked = served.asked
    what = "hidden states" if served.exact else f"the {asked.top_k} most likely tokens and a tail"
    notes = [f"teacher: {asked.model} at {address}, {what}"]
    if not served.exact:
        notes.append(
            "held-out rows are evaluated against these events alone (eval_events_forward_kl); "
            "measures that need all of the teacher's tokens are null"
        )
    return ChosenTeacher(served, served, {"teacher": served.width}, tuple(notes))


def open_writers(session: Session, config: RunConfig, start: Start) -> None:
    """Give a procedure the servers that write its text.

    The student's weights are handed over once, so that a server that cannot take them in is found
    out before the first step.

    Args:
        session: of the procedure.
        config: names the servers.
        start: provides folder and processes.

    Raises:
        InputError: a server does not answer, or does not take the weights in.
    """
    given, address = config.procedure, config.model.teacher
    session.served = {}
    if given.teacher_writer or is_address(address):
        named = ("procedure.teacher_writer", given.teacher_writer)
        key, at = named if given.teacher_writer else ("model.teacher", address)
        session.served[Origin.TEACHER] = _open(str(at), key, session, config, start)
    if given.writer is None:
        return
    writer = _open(given.writer, "procedure.writer", session, config, start)
    session.served[Origin.STUDENT] = writer
    place = start.folder / runs.WEIGHTS
    if given.sync_folder is not None:
        place = expand_home(given.sync_folder)
    make_output_folder(place)
    session.hands_over = StudentWriter(writer, place.resolve(), given.sync_steps)
    try:
        session.hand_over()
    except ServerError as error:
        raise InputError(str(error)) from error
    start.say(f"procedure: {given.writer} writes the student's answers")


def _open(at: str, key: str, session: Session, config: RunConfig, start: Start) -> ServedWriter:
    size, processes = session.vocab_size, start.world.size
    length = config.data.max_length
    return open_writer(at, key, config.served, length, size, processes, start.say)
