"""A compiler pass that reuses the exponentials of the softmax for probabilities.

A loss receives log-probabilities ``z - log(sum(exp(z)))`` and takes their exponential. This equals
``exp(z) / sum(exp(z))``, where ``exp(z)`` is already known, so a division replaces the second
exponential, the most expensive operation of a tile on a CPU (a quarter of the forward KL's time).
The exponential of half the log-probabilities, used by Hellinger's distance, is the square root.
Probabilities that underflowed, below 1e-38, have a root below 1e-18, which is negligible in a
float32 sum with terms near 1.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten


class ReuseExponentials(CustomGraphPass):
    """Replace ``exp(z - log(sum(exp(z))))``, and the exponential of its half, on a CPU.

    On an accelerator, recomputing an exponential is cheaper than storing it.
    """

    def __call__(self, graph: Graph) -> None:
        """Change a graph of aten operators in place."""
        for node in graph.find_nodes(op="call_function", target=_aten.exp.default):
            half = _halved(node.args[0])
            known = _normalised(node.args[0] if half is None else half)
            if known is None or node.meta["val"].device.type != "cpu":
                continue
            exponentials, total = known
            with graph.inserting_before(node):
                scale = graph.call_function(_aten.reciprocal.default, (total,))
                scale.meta["val"] = total.meta["val"]
                result = graph.call_function(_aten.mul.Tensor, (exponentials, scale))
                result.meta.update(node.meta)
                if half is not None:
                    result = graph.call_function(_aten.sqrt.default, (result,))
                    result.meta.update(node.meta)
            node.replace_all_uses_with(result)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """The version of the pass, for the compiler's cache."""
        return get_hash_for_files((__file__,))


def _halved(value: Any) -> Any:
    """The value ``x`` if a value is ``x / 2``, else None."""
    for operator, factor in ((_aten.div.Tensor, 2), (_aten.mul.Tensor, 0.5)):
        if _is(value, operator) and value.args[1] == factor:
            return value.args[0]
    return None


def _normalised(value: Any) -> tuple[Node, Node] | None:
    """``exp(z)`` and its sum if a value is ``z - log(sum(exp(z)))``, else None."""
    if _is(value, _aten.clamp_min.default):  # kdlosses.numerics.finite_log_probs
        value = value.args[0]
    if not _is(value, _aten.sub.Tensor):
        return None
    shifted, normaliser = value.args
    if not _is(normaliser, _aten.log.default) or not _is(normaliser.args[0], _aten.sum.dim_IntList):
        return None
    total = normaliser.args[0]
    exponentials = total.args[0]
    if not _is(exponentials, _aten.exp.default) or exponentials.args[0] is not shifted:
        return None
    return exponentials, total


def _is(value: Any, target: Any) -> bool:
    return isinstance(value, Node) and value.target is target
