"""The numbers of the TreeDiffusion papers, to stand beside ours.

Two papers of the same title: arXiv:2410.16910, and the version at ECML PKDD 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METHODS = {
    "treevae": "TreeVAE",
    "recon": "TreeVAE + Diffusion",
    "path": "TreeDiffusion",
    "none": "Diffusion alone",
    "recon+leaf": "Diffuse-TreeVAE",
}
"""Condition of a diffusion model, or `treevae` -> the method's name, in the order of Table 1."""


def method(condition: str) -> str:
    """What a diffusion model that is told so is called; of `treevae`, the tree alone."""
    return METHODS.get(condition, f"Diffusion, {condition}")


@dataclass(frozen=True)
class Published:
    """Numbers of one kind. numbers: data set -> method -> key -> (mean, standard deviation; None where none is given).

    Methods go by the condition of their diffusion model; `treevae` is the tree alone. ACC and NMI in percent.
    seeds: runs behind every mean, where the papers say so.
    """

    source: str
    seeds: int | None
    numbers: Mapping[str, Mapping[str, Mapping[str, tuple[float, float | None]]]]


FID = Published(
    "Table 1 of the ECML PKDD 2025 paper; that of arXiv:2410.16910 is the same without TreeVAE + Diffusion",
    10,
    {
        "mnist": {
            "treevae": {"fid_rec": (24.0, 0.9), "fid_gen": (21.8, 0.7)},
            "recon": {"fid_rec": (1.4, 0.0), "fid_gen": (1.8, 0.1)},
            "path": {"fid_rec": (1.5, 0.0), "fid_gen": (1.8, 0.1)},
        },
        "fashion-mnist": {
            "treevae": {"fid_rec": (40.7, 2.1), "fid_gen": (41.9, 2.1)},
            "recon": {"fid_rec": (4.8, 0.2), "fid_gen": (4.8, 0.2)},
            "path": {"fid_rec": (5.5, 0.6), "fid_gen": (5.4, 0.4)},
        },
        "cifar10": {
            "treevae": {"fid_rec": (175.8, 1.4), "fid_gen": (188.0, 2.0)},
            "recon": {"fid_rec": (12.3, 0.1), "fid_gen": (19.7, 0.2)},
            "path": {"fid_rec": (12.5, 0.4), "fid_gen": (17.8, 0.4)},
        },
        "cubicc": {
            "treevae": {"fid_rec": (232.5, 7.1), "fid_gen": (255.3, 8.8)},
            "recon": {"fid_rec": (12.7, 6.5), "fid_gen": (96.0, 2.1)},
            "path": {"fid_rec": (13.4, 0.9), "fid_gen": (29.0, 5.4)},
        },
        "celeba": {
            "treevae": {"fid_rec": (75.2, 15.0), "fid_gen": (77.9, 5.6)},
            "recon": {"fid_rec": (15.4, 3.2), "fid_gen": (30.1, 7.5)},
            "path": {"fid_rec": (14.1, 6.0), "fid_gen": (18.4, 7.2)},
        },
    },
)

CLUSTERS = Published(
    "Table 1 of arXiv:2410.16910",
    10,
    {
        "mnist": {"treevae": {"acc": (82.1, 4.8), "nmi": (82.8, 3.1)}},
        "fashion-mnist": {"treevae": {"acc": (58.5, 2.9), "nmi": (62.6, 2.5)}},
        "cifar10": {"treevae": {"acc": (50.1, 3.5), "nmi": (41.0, 2.7)}},
        "cubicc": {"treevae": {"acc": (40.1, 1.8), "nmi": (33.3, 1.4)}},
    },
)

ENTROPY = Published(
    "Table 2 of both papers",
    None,
    {
        "mnist": {"recon": {"classifier_entropy": (1.24, None)}, "path": {"classifier_entropy": (0.33, None)}},
        "fashion-mnist": {"recon": {"classifier_entropy": (0.66, None)}, "path": {"classifier_entropy": (0.65, None)}},
        "cifar10": {"recon": {"classifier_entropy": (1.12, None)}, "path": {"classifier_entropy": (0.93, None)}},
        "cubicc": {"recon": {"classifier_entropy": (0.07, None)}, "path": {"classifier_entropy": (0.20, None)}},
    },
)

VARIANTS = Published(
    "Table 3 of both papers; plain DDIM: section 4.3 of arXiv:2410.16910",
    10,
    {
        "cifar10": {
            "none": {"fid_gen": (18.1, None)},
            "recon": {"fid_gen": (19.7, 0.2)},
            "recon+leaf": {"fid_gen": (19.1, 0.3)},
            "recon+latent": {"fid_gen": (18.9, 0.3)},
            "recon+leaf+latent": {"fid_gen": (19.2, 0.2)},
            "leaf+latent": {"fid_gen": (19.1, 0.5)},
            "recon+path": {"fid_gen": (18.2, 0.3)},
            "path": {"fid_gen": (17.8, 0.4)},
        }
    },
)

IMAGES = {
    "mnist": {"train": 60_000, "test": 10_000},
    "fashion-mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "celeba": {"train": 162_770, "test": 19_962},
}
"""How many images the published data sets hold, where that is known."""
