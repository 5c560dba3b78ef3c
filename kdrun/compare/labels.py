"""Names of arms on screen and in reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdrun.compare.record import Arm


def label_arms(arms: Iterable[Arm]) -> dict[Arm, str]:
    """Unique names of arms: the method, and every setting that differs between arms."""
    listed = list(arms)

    def varies(name: str, among: Sequence[Arm]) -> bool:
        return len({getattr(arm, name) for arm in among}) > 1

    # The ratio of cross-entropy alone is always 0 and is omitted.
    ratios = varies("kd_ratio", [arm for arm in listed if arm.loss is not None])
    labels = {}
    for arm in listed:
        parts = ["cross-entropy alone" if arm.loss is None else printable(arm.loss)]
        if ratios and arm.loss is not None:
            parts.append(f"ratio {arm.kd_ratio:g}")
        if arm.procedure is not None:
            parts.append(printable(arm.procedure))
        if varies("lr", listed):
            parts.append(f"lr {arm.lr:g}")
        parts += [
            f"{name} {printable(getattr(arm, name))}"
            for name in ("teacher", "student")
            if varies(name, listed)
        ]
        labels[arm] = ", ".join(parts)
    return labels


def printable(name: str) -> str:
    """Replace line breaks and control characters by spaces, for tables."""
    return "".join(letter if letter.isprintable() else " " for letter in name)
