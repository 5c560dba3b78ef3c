"""Adds to datasets' interleaving: sources mixed by weights, each epoch and place from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdrun.data.lazy import Lazy
from kdrun.data.records import Position

if TYPE_CHECKING:
    import numpy as np

    from kdrun.data.encoding import Example


class Mixture(Lazy["Example"]):
    """Examples of several sources in given shares, as many in an epoch as there are.

    Which source a place draws from follows from seed and epoch. A source gives its examples in a
    random order, each once before any comes again, and goes on in the next epoch.

    Args:
        examples: of all sources.
        groups: number of the source of each.
        weights: of the sources.
        seed: of the run.

    Attributes:
        examples: the same.
    """

    def __init__(
        self, examples: Sequence[Example], groups: np.ndarray, weights: Sequence[float], seed: int
    ) -> None:
        import numpy as np

        self.examples, self._seed = examples, seed
        total = sum(weights)
        self._shares = [weight / total for weight in weights]
        self._members = [np.flatnonzero(groups == one) for one in range(len(weights))]
        self._numbers = np.empty(0, np.int64)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the examples of an epoch."""
        import numpy as np

        count = len(self.examples)
        self._numbers = np.empty(count, np.int64)
        drawn = [self._draw(number) for number in range(epoch + 1)]
        for source, members in enumerate(self._members):
            before = sum(int((one == source).sum()) for one in drawn[:-1])
            places = np.flatnonzero(drawn[-1] == source)
            self._numbers[places] = self._take(source, members, before, len(places))

    def __len__(self) -> int:
        return len(self._numbers)

    def element(self, number: int) -> Example:
        """Return an example of the current epoch."""
        return self.examples[self.among_all(number)]

    def among_all(self, number: int) -> int:
        """Return the number that an example of the current epoch has among all."""
        return int(self._numbers[number])

    def _draw(self, epoch: int) -> np.ndarray:
        """Return the source of each place of an epoch."""
        import numpy as np

        random = np.random.default_rng([self._seed, epoch])
        return random.choice(len(self._shares), len(self.examples), p=self._shares)

    def _take(self, source: int, members: np.ndarray, first: int, count: int) -> np.ndarray:
        """Return some examples of a source in its own endless order."""
        import numpy as np

        size = len(members)
        rounds = range(first // size, (first + count) // size + 1)
        order = [
            members[np.random.default_rng([self._seed, source, one, size]).permutation(size)]
            for one in rounds
        ]
        start = first - rounds[0] * size
        return np.concatenate(order)[start : start + count]


class MixedPlaces(Lazy[Position]):
    """Positions of a mixture's examples in the current epoch.

    Args:
        mixture: the examples.
        places: positions of all examples.
    """

    def __init__(self, mixture: Mixture, places: Sequence[Position]) -> None:
        self._mixture, self._places = mixture, places

    def __len__(self) -> int:
        return len(self._mixture)

    def element(self, number: int) -> Position:
        """Return a position."""
        return self._places[self._mixture.among_all(number)]


def mix(
    examples: Sequence[Example],
    groups: np.ndarray,
    weights: Sequence[float],
    seed: int,
    names: Sequence[str],
) -> tuple[Mixture, list[str]]:
    """Mix sources, and say how many examples of each an epoch has.

    Args:
        examples: of all sources.
        groups: number of the source of each.
        weights: of the sources.
        seed: of the run.
        names: of the sources.
    """
    mixture = Mixture(examples, groups, weights, seed)
    total = sum(weights)
    lines = []
    for number, (name, weight) in enumerate(zip(names, weights, strict=True)):
        there = int((groups == number).sum())
        share = weight / total
        lines.append(
            f"{name}: {share:.0%} of the training rows, each of its {there} rows "
            f"{share * len(examples) / there:.2g} times an epoch"
        )
    return mixture, lines
