"""Where training rows stand in the user's data, for messages about some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrun.data.collate import ROW
from kdrun.data.records import Position
from kdrun.data.rows import name_positions


@dataclass(frozen=True)
class Origins:
    """Where the rows of a training set come from.

    Attributes:
        positions: of each example; None for windows of plain text, which are in no one place.
        members: for each packed row the numbers of its examples; None where nothing is packed.
    """

    positions: Sequence[Position] | None = None
    members: Sequence[Sequence[int]] | None = None

    def name(self, rows: Sequence[int]) -> str:
        """Words for rows of the training set, by their numbers."""
        if self.positions is None:
            shown = ", ".join(str(row + 1) for row in rows)
            return f"window{'s' if len(rows) > 1 else ''} {shown} of the text"
        numbers = rows
        if self.members is not None:
            numbers = sorted(number for row in rows for number in self.members[row])
        found = [self.positions[number] for number in numbers]
        return f"{found[0].file}, {name_positions(found)}"


class Numbered(Sequence[dict[str, Any]]):
    """A training set whose examples carry their numbers.

    Args:
        data: examples; where it moves from epoch to epoch, so does this.
    """

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        example: Mapping[str, Any] = self._data[index]
        return {**example, ROW: index}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def set_epoch(self, epoch: int) -> None:
        """Tell the data which epoch it is."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch)
