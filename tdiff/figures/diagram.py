"""The learned tree as HTML: a button at every node over an SVG of the branches, laid out from the topology alone.

Lengths are CSS pixels at scale 1; the page scales the whole by the CSS variable --scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from tdiff.figures.contents import NodeContents
from tdiff.figures.markup import picture, share, text
from tdiff.figures.plots import leaf_columns
from tdiff.figures.sheets import sheet
from tdiff.tree.topology import Topology

SLOT, FACE, LABEL, BAND, EXAMPLES, MARGIN = 98, 56, 22, 34, 9, 12
"""Width of a leaf's place; height of a node's picture, of its label, of the branches; examples below a leaf."""

PRINTED = 680
"""CSS pixels across a printed page."""


def names(topology: Topology) -> dict[int, str]:
    """What every node is called: leaves by their place, inner nodes by the leaves below them."""
    place = {leaf: k for k, leaf in enumerate(topology.leaves)}
    found = {}
    for node in topology.top_down:
        below = [place[leaf] for leaf in topology.leaves_below(node)]
        if topology.is_leaf(node):
            found[node] = f"Leaf {below[0]}"
        elif node == 0:
            found[node] = "Root"
        else:
            found[node] = f"Leaves {below[0]}–{below[-1]}" if len(below) > 1 else f"Above leaf {below[0]}"
    return found


def tree(topology: Topology, nodes: Mapping[int, NodeContents]) -> str:
    """The tree in a box of its own: leaves along the bottom, a branch as thick as its share of the images."""
    rows = max(topology.depth, 1)
    examples = max(_count(nodes[leaf]) for leaf in topology.leaves)
    width = len(topology.leaves) * SLOT + 2 * MARGIN
    floor = MARGIN + rows * (FACE + LABEL + BAND)
    height = floor + FACE + LABEL + math.ceil(examples / 3) * SLOT / 3 + MARGIN
    x = {node: MARGIN + (column + 0.5) * SLOT for node, column in leaf_columns(topology).items()}
    y = {
        node: floor if topology.is_leaf(node) else MARGIN + topology[node].depth * (FACE + LABEL + BAND)
        for node in topology.top_down
    }
    called = names(topology)
    branches = "".join(_branch(topology, nodes, node, x, y) for node in topology.top_down if node)
    buttons = "".join(
        _button(topology, nodes[node], node, called[node], x[node], y[node]) for node in topology.top_down
    )
    return (
        f'<div class="space" id="space" data-width="{width}" data-height="{height:.0f}" '
        f'style="--width:{width};--height:{height:.0f};--printed:{min(1.0, PRINTED / width):.3f}"><div class="tree" '
        f'role="group" aria-label="The learned tree. Arrow keys move between nodes, Enter shows one.">'
        f'<svg viewBox="0 0 {width} {height:.0f}" width="{width}" height="{height:.0f}" aria-hidden="true">{branches}'
        f"</svg>{buttons}</div></div>"
    )


def _branch(
    topology: Topology, nodes: Mapping[int, NodeContents], node: int, x: Mapping[int, float], y: Mapping[int, float]
) -> str:
    """From the parent's label a soft S into the node's column, then straight down."""
    parent = topology[node].parent
    assert parent is not None
    start, bend, end = y[parent] + FACE + LABEL, y[parent] + FACE + LABEL + BAND, y[node]
    middle = (start + bend) / 2
    thick = 1.5 + 12 * nodes[node].share
    above, here = f"{x[parent]:.1f}", f"{x[node]:.1f}"
    return (
        f'<path id="branch-{node}" stroke-width="{thick:.1f}" '
        f'd="M{above} {start:.1f}C{above} {middle:.1f} {here} {middle:.1f} {here} {bend:.1f}V{end:.1f}"/>'
    )


def _button(topology: Topology, shown: NodeContents, node: int, name: str, x: float, y: float) -> str:
    leaf = topology.is_leaf(node)
    side = topology[node].side
    place = "the whole tree" if side is None else f"{side} branch at depth {topology[node].depth}"
    said = f"{name}: {share(shown.share)} of the images, {place}"
    width = SLOT - 12 if leaf else FACE + 12
    label = f"<b>{text(name)}</b> {text(share(shown.share))}" if leaf else text(share(shown.share))
    face = picture(sheet(shown.average[None], 1), "", "face")
    below = _examples(shown) if leaf and len(shown.typical) else ""
    relatives = {
        "parent": topology[node].parent,
        "left": topology.children(node)[0],
        "right": topology.children(node)[1],
    }
    data = "".join(f' data-{key}="{value}"' for key, value in relatives.items() if value is not None)
    return (
        f'<button type="button" class="node-button{" leaf" if leaf else ""}" id="button-{node}" '
        f'data-node="{node}"{data} data-depth="{topology[node].depth}" '
        f'style="left:{x - width / 2:.1f}px;top:{y:.1f}px;width:{width}px" '
        f'aria-label="{text(said)}" aria-controls="node-{node}" aria-expanded="false">{face}'
        f'<span class="label">{label}</span>{below}</button>'
    )


def _examples(shown: NodeContents) -> str:
    """Typical images below a leaf, three to a row."""
    tiles = sheet(shown.typical[: _count(shown)], 3)
    return picture(tiles, "", "examples", width=(SLOT - 12) * tiles.columns / 3)


def _count(shown: NodeContents) -> int:
    """How many of them: whole rows, if it has one."""
    there = min(len(shown.typical), EXAMPLES)
    return there if there < 3 else there // 3 * 3
