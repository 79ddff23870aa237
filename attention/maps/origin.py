"""Where the images of a node come from, in the workflow that runs.

A workflow is a dict of nodes by id, each with ``class_type`` and ``inputs``; an input that is a link is [id of a node, output].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Node = Mapping[str, Any]
_PASSES_ON = ("FoveaSaveAttnMaps",)  # nodes whose output is what came in


class Origin:
    """The nodes that lead to one input of one node.

    Args:
        node_id: of the node that asks.
        get_node: id -> node; raises where there is none.
        nodes: all ids.
        name: of the input.
        prompt: of the queue.
    """

    def __init__(
        self, node_id: str, get_node: Callable[[str], Node], nodes: list[str], prompt: str = "", name: str = "images"
    ) -> None:
        self.node_id = node_id
        self.prompt = prompt
        self._get_node = get_node
        self._nodes = nodes
        self._signatures: dict[str, str] = {}
        self.ancestors = self._nearest_first(name)

    def _links(self, node_id: str) -> Iterator[tuple[str, str, int]]:
        try:
            inputs = self._get_node(node_id).get("inputs", {})
        except Exception:  # ComfyUI raises an error of its own for a node that an expansion has taken away
            return
        for name, value in inputs.items():
            if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str):
                yield name, value[0], value[1]

    def _nearest_first(self, name: str) -> list[str]:
        """Return ids of the nodes before the input, those that are the fewest links away first."""
        found = list(dict.fromkeys(source for own, source, _ in self._links(self.node_id) if own == name))
        for node in found:
            found += [source for source in dict.fromkeys(s for _, s, _ in self._links(node)) if source not in found]
        return found

    def signature(self, node_id: str) -> str:
        """Return what is known again of a node and all that leads to it: two equal ones give the same result."""
        if node_id not in self._signatures:
            self._signatures[node_id] = ""  # a loop ends here
            try:
                node = self._get_node(node_id)
            except Exception:
                return ""
            linked = {name: [self.signature(source), slot] for name, source, slot in self._links(node_id)}
            told = [node.get("class_type"), {**node.get("inputs", {}), **linked}]
            text = json.dumps(told, sort_keys=True, default=str)
            self._signatures[node_id] = hashlib.sha256(text.encode()).hexdigest()
        return self._signatures[node_id]

    def seeds(self, node_id: str) -> set[int]:
        """Return the seeds that are typed in a node or in the noise node linked to it."""
        found: set[int] = set()
        for each in (node_id, *(source for name, source, _ in self._links(node_id) if name in ("noise", "seed", "noise_seed"))):
            try:
                inputs = self._get_node(each).get("inputs", {})
            except Exception:
                continue
            found |= {value for name in ("seed", "noise_seed", "value") if isinstance(value := inputs.get(name), int)}
        return found

    def sharing(self, name: str = "attn_maps") -> set[str]:
        """Return ids of all nodes that get what the node that asks gets at its input ``name``, itself included."""

        def root(source: str, slot: int) -> tuple[str, int]:
            """Return where it comes from, through nodes that pass it on."""
            passed = next(((before, at) for given, before, at in self._links(source) if given == name), None)
            return (
                root(*passed) if passed is not None and self._get_node(source).get("class_type") in _PASSES_ON else (source, slot)
            )

        own = {root(source, slot) for given, source, slot in self._links(self.node_id) if given == name}
        return {node for node in self._nodes for _, source, slot in self._links(node) if root(source, slot) in own}


def leads_from(run_node: str, node_id: str) -> bool:
    """Return whether a run of ``run_node`` belongs to ``node_id``: itself, or a node that it expanded to."""
    return run_node == node_id or run_node.startswith(f"{node_id}.")
