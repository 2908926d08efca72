"""What the report of a run shows, as plain arrays and numbers: no storage, no model, no HTML.

`tdiff.work.showing` gathers it, `tdiff.figures.page` lays it out.

Legend: K images, I channels, H image size, L leaves, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdiff.tree.topology import Topology

Pixels = NDArray[np.uint8]
"""Images [K, I, H, H]."""

Table = tuple[str, Sequence[Sequence[str]]]
"""A title and rows of cells, the first of them the header."""


@dataclass(frozen=True)
class Mean:
    """A mean over images; standard_error: None where there are too few of them."""

    value: float
    images: int
    standard_error: float | None = None


@dataclass(frozen=True)
class NodeContents:
    """What a node shows: of an inner node, what the leaves below it hold and draw.

    share: mean probability with which an image comes here; count: images whose most probable leaf lies here.
    average: [I, H, H]; typical, spread: real images, most typical first, and from the most typical to the least.
    treediffusion, treevae: generated ones for the same latents, None without samples.
    classes, predicted: counts [C] of the real images' labels, and of what a classifier sees in generated ones.
    """

    share: float
    count: int
    average: NDArray[np.uint8]
    typical: Pixels
    spread: Pixels
    treediffusion: Pixels | None = None
    treevae: Pixels | None = None
    classes: NDArray[np.int64] | None = None
    predicted: NDArray[np.int64] | None = None
    elbo: Mean | None = None


@dataclass(frozen=True)
class RootDraw:
    """One draw at the root through every leaf. probabilities: [L]; treediffusion, treevae: [L, I, H, H]."""

    probabilities: NDArray[np.float64]
    treediffusion: Pixels
    treevae: Pixels


@dataclass(frozen=True)
class Chart:
    """Named lines of (step, value); a value that is not finite leaves a gap."""

    title: str
    note: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Contents:
    """All that a run's report shows, as far as the run has come: what is not there yet is empty.

    facts, origin: (name, value) of what the run found, and of what made it; nodes: by node id.
    samples: (title, images) to stand side by side, image k of each made from the same latents, but for the real ones.
    nearest: (title, images) of samples, and of the training images nearest to them.
    elbo_of: what the nodes' ELBO is the mean over, 'held-out' or 'training' images.
    model: what the diffusion model is called.
    missing: sentences that name what the run lacks, and the command that makes it.
    """

    name: str
    topology: Topology
    images: int
    facts: Sequence[tuple[str, str]]
    nodes: Mapping[int, NodeContents]
    config: str
    origin: Sequence[tuple[str, str]] = ()
    class_names: Sequence[str] = ()
    draws: Sequence[RootDraw] = ()
    samples: Sequence[tuple[str, Pixels]] = ()
    nearest: Sequence[tuple[str, Pixels]] = ()
    elbo_of: str = "held-out"
    model: str = "TreeDiffusion"
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    missing: Sequence[str] = ()
