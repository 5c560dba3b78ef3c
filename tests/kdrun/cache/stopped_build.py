"""Runs kdrun, and sends itself a signal when a cache has so many rows: SIGNAL ROWS ARGUMENT...

Every batch becomes a shard, as in a long build.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from kdrun.cache.write import ShardWriter, StoredRow
from kdrun.cli import main

signum, enough = int(sys.argv[1]), int(sys.argv[2])
ordinary = ShardWriter.add


def add(self: ShardWriter, first: int, rows: Sequence[StoredRow]) -> None:
    ordinary(self, first, rows)
    self.flush()
    if first + len(rows) >= enough:
        os.kill(os.getpid(), signum)


ShardWriter.add = add  # type: ignore[method-assign]
sys.argv = ["kdrun", *sys.argv[3:]]
main()
