"""Pairs of layers whose hidden states are compared: ``uniform``, ``last`` or ``4-1,8-3``.

Layers are counted from 1, and a layer's state is what it hands on to the next one: that of the last
layer is not yet normalised.
"""

import re

_PAIR = re.compile(r"(\d+)-(\d+)")
UNIFORM, LAST = "uniform", "last"
LayerPair = tuple[int, int]


class LayerMapError(ValueError):
    """Pairs of layers that are malformed, or that the models do not have."""


def check_layers(text: str) -> None:
    """Refuse a map that is malformed for any models.

    Raises:
        LayerMapError: another form, a layer 0, or a pair or student layer given twice.
    """
    _explicit(text)


def layer_pairs(text: str, teacher_layers: int, student_layers: int) -> tuple[LayerPair, ...]:
    """Pairs ``(teacher layer, student layer)``, counted from 1.

    Args:
        text: ``uniform``, which pairs layer i of a student with S layers with layer ``i T / S`` of
            a teacher with T layers, rounded up; ``last``; or pairs such as ``4-1,8-3``, each with
            the teacher's layer first.
        teacher_layers: T.
        student_layers: S.

    Raises:
        LayerMapError: as in :func:`check_layers`, or a layer that a model does not have.
    """
    given = _explicit(text)
    if text == LAST:
        return ((teacher_layers, student_layers),)
    if text == UNIFORM:
        return tuple(
            (-(-i * teacher_layers // student_layers), i) for i in range(1, student_layers + 1)
        )
    for teacher, student in given:
        for whose, layer, layers in (
            ("teacher", teacher, teacher_layers),
            ("student", student, student_layers),
        ):
            if layer > layers:
                raise LayerMapError(
                    f"layers={teacher}-{student}: the {whose} has {layers} layers, not {layer}; "
                    "write teacher-student, counted from 1"
                )
    return given


def _explicit(text: str) -> tuple[LayerPair, ...]:
    if text in (UNIFORM, LAST):
        return ()
    pairs: list[LayerPair] = []
    for item in text.split(","):
        match = _PAIR.fullmatch(item.strip())
        if match is None or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
            raise LayerMapError(
                f"layers={text}: expected uniform, last, or pairs of teacher and student layers "
                f"counted from 1, such as 4-1,8-3; got {item.strip()!r}"
            )
        pairs.append((int(match[1]), int(match[2])))
    twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
    if twice is not None:
        raise LayerMapError(f"layers={text}: {twice[0]}-{twice[1]} is given twice")
    return tuple(pairs)
