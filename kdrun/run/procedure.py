"""The rows that a procedure of a run works on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdrun.data.encoder import Kept
from kdrun.data.prepare import Examples, encode_held_out
from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrun.data.encoder import Encoder
    from kdrun.procedures.sampling import Sampling


def leave_room(
    examples: Examples, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
) -> Examples:
    """Skip the training rows whose prompts leave no room for an answer.

    Raises:
        InputError: the tokenizer has no end token, or no row remains.
    """
    from kdrun.data.windows import TextWindows
    from kdrun.procedures.sampling import need_end_token

    need_end_token(tokenizer)
    rows: Any = examples.train
    looked_at = 1 if isinstance(rows, TextWindows) else len(rows)  # windows have equal length
    asked = [bool(sampling.prompt_of(rows[number])) for number in range(looked_at)]
    if all(asked):
        return examples
    cure = (
        f"{sampling.max_new_tokens} new tokens in data.max_length={sampling.max_length}; lower "
        "procedure.max_new_tokens, or raise --max-length"
    )
    if not any(asked):
        raise InputError(f"procedure: no prompt leaves room for {cure}")
    numbers = [number for number, fits in enumerate(asked) if fits]
    kept = Kept(rows, numbers)
    left_out = len(asked) - len(kept)
    note = (
        f"procedure: skipped {left_out} of {len(asked)} training rows, whose prompts leave no "
        f"room for {cure}"
    )
    positions = examples.origins.positions
    if positions is not None:
        positions = [positions[number] for number in numbers]
    origins = replace(examples.origins, positions=positions)
    notes = (*examples.notes, note)
    return replace(examples, train=kept, notes=notes, origins=origins)  # type: ignore[arg-type]


def read_text(source: str | None, encoder: Encoder) -> tuple[Any, list[str]]:
    """Read windows of ``procedure.text`` and notes on them; None and no notes if it is unset.

    Raises:
        InputError: it cannot be read, or is not plain text.
    """
    from kdrun.data.rows import TextRow, load_rows

    if source is None:
        return None, []
    rows = load_rows(source, strict=encoder.strict).rows
    if not isinstance(rows[0], TextRow):
        raise InputError(f"procedure.text={source}: contains conversations; pass plain text")
    windows, notes = encode_held_out(rows, encoder)
    return windows, [f"procedure.text: {note}" for note in notes]
