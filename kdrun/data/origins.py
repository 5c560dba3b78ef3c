"""Adds to datasets' row numbers: the file and line of a row, for messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrun.data.collate import ROW
from kdrun.data.records import Position
from kdrun.data.rows import name_positions


@dataclass(frozen=True)
class Origins:
    """Origins of the rows of a training set.

    Attributes:
        positions: position of each example; None for windows of plain text, which have none.
        members: for each packed row the numbers of its examples; None without packing.
    """

    positions: Sequence[Position] | None = None
    members: Sequence[Sequence[int]] | None = None

    def name(self, rows: Sequence[int]) -> str:
        """Describe rows of the training set, given by number."""
        if self.positions is None:
            shown = ", ".join(str(row + 1) for row in rows)
            return f"window{'s' if len(rows) > 1 else ''} {shown} of the text"
        numbers = rows
        if self.members is not None:
            numbers = sorted(number for row in rows for number in self.members[row])
        found = [self.positions[number] for number in numbers]
        return f"{found[0].file}, {name_positions(found)}"


class Numbered(Sequence[dict[str, Any]]):
    """A training set whose examples include their numbers.

    Args:
        data: examples; may change from epoch to epoch.
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
        """Set the epoch of the data."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch)
