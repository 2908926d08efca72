"""The report: one self-contained HTML page that needs no network, nor a script to be read.

Everything that a user can name (run, classes, settings) goes through `markup.text`; the page's own script, report.js,
is the only one that the page's policy lets run, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from tdiff.figures import diagram, markup
from tdiff.figures.contents import Contents, NodeContents, Pixels, RootDraw
from tdiff.figures.markup import facts, share, strip, text
from tdiff.figures.sheets import sheet

ACROSS, LARGEST = 1180, 96
"""CSS pixels that the images of a root draw may take in all, and each."""


def page(found: Contents) -> str:
    """HTML of a run, as far as it has come."""
    script, style = _file("report.js"), _file("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        ("tree", "The tree", _tree(found)),
        ("walk", "One root draw through every leaf", _walk(found)),
        ("leaves", "New images, leaf by leaf", _leaves(found)),
        ("samples", "Samples side by side", _samples(found)),
        ("nearest", "Nearest training images", _nearest(found)),
        ("numbers", "Numbers", markup.tables(found.tables)),
        ("training", "Training", "".join(markup.chart(chart) for chart in found.charts)),
        ("config", "Config", _config(found)),
    ]
    there = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in there)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{content}</section>'
        for name, title, content in there
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{text(found.name)} · tdiff</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#tree">To the tree</a>{_header(found)}<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main>{body}</main><p class="unseen" id="said" role="status"></p><script>{script}</script></body></html>\n'
    )


def _file(name: str) -> str:
    return resources.files("tdiff.figures").joinpath(name).read_text(encoding="utf-8")


def _header(found: Contents) -> str:
    leaves = len(found.topology.leaves)
    groups = "group" if leaves == 1 else "groups"
    missing = "".join(f"<p class='missing'>{text(sentence)}</p>" for sentence in found.missing)
    return (
        f"<header><h1><bdi>{text(found.name)}</bdi></h1><p class='lead'>{leaves} {groups} found in "
        f"{found.images:,} images, without using labels.</p>{missing}"
        f"{facts([(name, text(value)) for name, value in found.facts])}</header>"
    )


# --- the tree and its nodes --------------------------------------------------------------------------


def _tree(found: Contents) -> str:
    """The tree beside the panel of the node that is chosen. Without a script, and on paper, all panels show."""
    called = diagram.names(found.topology)
    panels = "".join(_node(found, node, called) for node in found.topology.top_down)
    return (
        '<p class="note">At every node the average of its images and its share of them; below a leaf, its most typical '
        'images. <span class="scripted">Choose a node to see what it holds: by a click, or with the arrow keys and '
        "Enter.</span></p>"
        '<div class="split"><div class="frame"><div class="zoom scripted" role="group" aria-label="Zoom of the tree">'
        '<button type="button" id="smaller" aria-label="Smaller">−</button>'
        '<button type="button" id="fit" aria-label="Fit the tree to its box">Fit</button>'
        '<button type="button" id="larger" aria-label="Larger">+</button></div>'
        f'<div class="scroll box" id="box" role="region" aria-label="Tree, scrollable">'
        f'{diagram.tree(found.topology, found.nodes)}</div></div><div class="panel" id="panel" role="region" '
        f'aria-label="What the chosen node holds" tabindex="0">{panels}</div></div>'
    )


def _node(found: Contents, node: int, called: dict[int, str]) -> str:
    shown, name, leaf = found.nodes[node], called[node], found.topology.is_leaf(node)
    whose = "of this leaf" if leaf else "of the leaves below"
    parts = [
        f'<h3 id="node-{node}-title" tabindex="-1">{text(name)}</h3>',
        _relatives(found, node, called),
        facts(_numbers(found, shown, node)),
    ]
    if shown.count:
        title = "Real images, most typical first" if leaf else "Real images, the most typical of each leaf"
        parts.append(strip(title, shown.typical, f"{len(shown.typical)} typical real images of {name}"))
        title = "Real images, from typical to unusual" if leaf else "Real images, as often as they come here"
        parts.append(strip(title, shown.spread, f"{len(shown.spread)} real images across {name}"))
    else:
        parts.append('<p class="note">No image comes here rather than elsewhere.</p>')
    if shown.treediffusion is not None and shown.treevae is not None:
        alt = f"{len(shown.treediffusion)} generated images {whose}"
        parts.append(
            strip(f"Drawn by {found.model}, {whose}", shown.treediffusion, f"{alt}, by {found.model}", f"drawn-{node}")
        )
        parts.append(strip("The TreeVAE's, for the same latents", shown.treevae, f"{alt}, by the TreeVAE"))
    if shown.classes is not None:
        parts.append(
            markup.bars(shown.classes.tolist(), found.class_names, "Labels of its images, not used in training")
        )
    return f'<section class="node" id="node-{node}" aria-labelledby="node-{node}-title">{"".join(parts)}</section>'


def _relatives(found: Contents, node: int, called: dict[int, str]) -> str:
    """Links to the node above and those below."""
    parent = found.topology[node].parent
    near = [] if parent is None else [f'above: <a href="#node-{parent}">{text(called[parent])}</a>']
    below = [child for child in found.topology.children(node) if child is not None]
    if below:
        near.append("below: " + ", ".join(f'<a href="#node-{child}">{text(called[child])}</a>' for child in below))
    return f'<p class="relatives">{" · ".join(near)}</p>' if near else ""


def _numbers(found: Contents, shown: NodeContents, node: int) -> list[tuple[str, str]]:
    numbers = [
        ("Share of the data", f"{100 * shown.share:.1f}%"),
        ("Images that come here", f"{shown.count:,} of {found.images:,}"),
    ]
    if shown.elbo is not None:
        plural = "image" if shown.elbo.images == 1 else "images"
        note = f"mean of {shown.elbo.images:,} {found.elbo_of} {plural}"
        numbers.append(("ELBO", f"{markup.mean(shown.elbo, 'nats')}<small>{note}</small>"))
    at = found.topology[node]
    numbers.append(("Made by", f"{text(at.phase)}<small>node {node}, depth {at.depth}</small>"))
    return numbers


# --- generated images --------------------------------------------------------------------------------


def _walk(found: Contents) -> str:
    if not found.draws:
        return ""
    leaves, first = len(found.topology.leaves), int(found.draws[0].probabilities.argmax())
    choice = "".join(
        f'<label><input type="radio" name="draw" value="{k}"{" checked" if k == 0 else ""}> {k + 1}</label>'
        for k in range(len(found.draws))
    )
    large = "".join(
        f'<figure><canvas data-model="{model}" data-name="{name}" role="img" aria-label="{name}"></canvas>'
        f"<figcaption>{name}</figcaption></figure>"
        for model, name in (("treediffusion", text(found.model)), ("treevae", "TreeVAE"))
    )
    return (
        '<p class="note">The same latents at the root and the same noise: only the way down the tree differs. The per '
        "cent are the probability with which the draw comes to that leaf.</p>"
        '<div class="stage scripted"><div class="controls">'
        f'<fieldset><legend>Draw</legend>{choice}</fieldset><label for="leaf">Leaf</label>'
        f'<input type="range" id="leaf" min="0" max="{leaves - 1}" step="1" value="{first}">'
        f'<output for="leaf" id="at"></output></div><div class="large">{large}</div></div>'
        f"{''.join(_draw(draw, k, text(found.model)) for k, draw in enumerate(found.draws))}"
    )


def _draw(draw: RootDraw, k: int, called: str) -> str:
    """A draw's two rows of images over its probabilities, leaf under leaf. called: the diffusion model, as HTML."""
    leaves = len(draw.probabilities)
    rows = []
    for model, name, images in (
        ("treediffusion", called, draw.treediffusion),
        ("treevae", "TreeVAE", draw.treevae),
    ):
        tiles = sheet(images, leaves)
        alt = f"Root draw {k + 1} through leaves 0 to {leaves - 1}, by {name}"
        rows.append(
            f'<figure><figcaption>{name}</figcaption><div class="tiles"><img class="sheet" data-model="{model}" '
            f'src="{tiles.uri}" alt="{alt}" width="{tiles.size[0]}" height="{tiles.size[1]}" '
            f'data-tile="{tiles.tile}" data-gap="{tiles.gap}"><span></span></div></figure>'
        )
    size, small = images.shape[-1], tiles.shown
    large = max(small, int(min(LARGEST, ACROSS / leaves)) // size * size)
    style = f"--leaves:{leaves};--tile:{large}px;--small:{small}px;--ratio:{tiles.gap / tiles.tile:.4f}"
    labels = "".join(
        f'<li style="--p:{p:.4f}"><span class="unseen">leaf </span>{leaf}<b>{text(share(float(p)))}</b></li>'
        for leaf, p in enumerate(draw.probabilities)
    )
    return (
        f'<div class="scroll draw" role="group" aria-label="Draw {k + 1}" tabindex="0">'
        f'<div class="rows" style="{style}">{"".join(rows)}'
        f'<ol start="0">{labels}</ol></div></div>'
    )


def _leaves(found: Contents) -> str:
    """Every leaf's generated images over the classes that a classifier sees in them, or else over its own labels."""
    cards = []
    for k, leaf in enumerate(found.topology.leaves):
        shown = found.nodes[leaf]
        if shown.treediffusion is None or not len(shown.treediffusion):
            continue
        counts = shown.predicted if shown.predicted is not None else shown.classes
        under = "" if counts is None else markup.columns(counts.tolist(), found.class_names)
        # The image itself stands once in the page, in the leaf's panel.
        cards.append(
            f'<li><h3><a href="#node-{leaf}">Leaf {k}</a> <span>{text(share(shown.share))}</span></h3>'
            f'<img class="sheet" data-copy="drawn-{leaf}" alt="Generated images of leaf {k}">{under}</li>'
        )
    if not cards:
        return ""
    first = found.nodes[found.topology.leaves[0]]
    note = f"Drawn by {text(found.model)}."
    if first.predicted is not None:
        note += (
            " Below each, the classes that a classifier, trained on the labelled images, sees in the images drawn of"
            " that leaf."
        )
    elif first.classes is not None:
        note += " Below each, the labels of the leaf's real images."
    return f'<p class="note">{note}</p><ul class="cards">{"".join(cards)}</ul>'


def _samples(found: Contents) -> str:
    if not found.samples:
        return ""
    return (
        '<p class="note">Real images, and samples from the prior. TreeVAE and '
        f"{text(found.model)} have the same latents, image by image.</p>{_blocks(found.samples)}"
    )


def _nearest(found: Contents) -> str:
    if not found.nearest:
        return ""
    return (
        '<p class="note">Samples, and the training image nearest to each by its pixels: what is learnt by heart would '
        f"look the same on both sides.</p>{_blocks(found.nearest)}"
    )


def _blocks(blocks: Sequence[tuple[str, Pixels]]) -> str:
    shown = "".join(
        f"<div><h3>{text(title)}</h3>{markup.picture(sheet(images, 10), f'{len(images)} images: {title}')}</div>"
        for title, images in blocks
        if len(images)
    )
    return f'<div class="blocks">{shown}</div>'


def _config(found: Contents) -> str:
    return (
        f"{facts([(name, text(value)) for name, value in found.origin])}"
        "<details><summary>The resolved settings of this run</summary>"
        f'<pre tabindex="0" aria-label="config.yaml">{text(found.config)}</pre></details>'
    )
