"""What the U-Net is told about an image's place in the tree, and the network that is told it.

The variants are those of Table 3 of the TreeDiffusion paper: the leaf's reconstruction beside x_t, the leaf,
the leaf's latent, or the whole path (the default), whose embedding is

    y = sum over the nodes i of the path of  f_embed(flatten z_i) + f_node(i)

`leaf` keeps the leaf's f_node alone, `latent` its f_embed alone, `leaf+latent` both. y is added to the time embedding.

Beside the variants there are controls, which are told a label that is not the tree's as `leaf` is told the leaf's:
kmeans-10 and kmeans-100 the image's k-means cluster on pixels, shuffled-leaf the leaf of another image.

Legend: B batch, P nodes on a path (padded), I image channels, H = W image size, D latent channels,
r latent size, E embedding width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from tdiff.diffusion.process import OBJECTIVES, Objective
from tdiff.diffusion.unet import UNet, UNetSpec
from tdiff.tree.model import Path

NodeEncoding = Literal["index", "embedding"]
NODE_ENCODINGS: tuple[NodeEncoding, ...] = ("index", "embedding")


@dataclass(frozen=True)
class Condition:
    """Which parts of the tree's answer the U-Net sees."""

    recon: bool = False  # the leaf's reconstruction, beside x_t
    leaf: bool = False  # f_node of the leaf
    latent: bool = False  # f_embed of the leaf's latent
    path: bool = False  # both, of every node on the path

    @property
    def embeds_nodes(self) -> bool:
        """Whether f_node exists."""
        return self.leaf or self.path

    @property
    def embeds_latents(self) -> bool:
        """Whether f_embed exists."""
        return self.latent or self.path

    @property
    def embeds(self) -> bool:
        """Whether there is an embedding y at all."""
        return self.embeds_nodes or self.embeds_latents


CONDITIONS: dict[str, Condition] = {
    "none": Condition(),
    "recon": Condition(recon=True),
    "recon+leaf": Condition(recon=True, leaf=True),
    "recon+latent": Condition(recon=True, latent=True),
    "recon+leaf+latent": Condition(recon=True, leaf=True, latent=True),
    "leaf+latent": Condition(leaf=True, latent=True),
    "recon+path": Condition(recon=True, path=True),
    "path": Condition(path=True),
}


CLUSTERS = {"kmeans-10": 10, "kmeans-100": 100}
"""Control that tells an image's k-means cluster -> number of clusters."""

CONTROLS = dict.fromkeys([*CLUSTERS, "shuffled-leaf"], Condition(leaf=True))
"""Conditions that tell a label in the leaf's place (`label_path`)."""

KNOWN_CONDITIONS = CONDITIONS | CONTROLS


def label_path(label: Tensor) -> Path:
    """Labels [B] as paths of one node without latents, by which a control is told them."""
    nothing = torch.empty(len(label), 1, 0, device=label.device)
    return Path(z=nothing, nodes=label[:, None], leaf=label, reach=nothing[:, 0])


@dataclass(frozen=True)
class DenoiserSpec:
    """All that a denoiser's shape depends on; as JSON it is unet.json. Raises ValueError for what cannot be built.

    condition: a key of KNOWN_CONDITIONS. node_encoding: f_node reads the breadth-first position as one raw number
    ("index", the public code) or a learned vector a node ("embedding"). nodes: in the final tree, or clusters in their
    place. latent_size: numbers in one latent, D * r * r. null: whether samples can be told nothing, for guidance: a
    learned vector in place of the embedding, 0 (grey) in place of the reconstruction. objective and timesteps: what the
    outputs mean and the length of the schedule, without which they cannot be read.
    """

    unet: UNetSpec
    condition: str
    node_encoding: NodeEncoding
    nodes: int
    latent_size: int
    null: bool = False
    objective: Objective = "noise"
    timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective is {self.objective!r}: choose one of {', '.join(OBJECTIVES)}")
        if self.condition not in KNOWN_CONDITIONS:
            raise ValueError(f"condition is {self.condition!r}: choose one of {', '.join(KNOWN_CONDITIONS)}")
        if self.node_encoding not in NODE_ENCODINGS:
            raise ValueError(f"node_encoding is {self.node_encoding!r}: choose one of {', '.join(NODE_ENCODINGS)}")
        told = self.told
        if told.embeds_nodes and self.nodes < 1:
            raise ValueError(
                f"nodes is {self.nodes}, but condition {self.condition!r} needs how many there are to tell apart"
            )
        if told.embeds_latents and self.latent_size < 1:
            raise ValueError(f"latent_size is {self.latent_size}, but condition {self.condition!r} embeds latents")
        if self.null and not (told.embeds or told.recon):
            raise ValueError(f"null is set, but condition {self.condition!r} tells nothing that it could replace")
        if self.unet.condition_channels != (expected := self.unet.channels if told.recon else 0):
            raise ValueError(
                f"condition_channels is {self.unet.condition_channels}, "
                f"but must be {expected} with condition {self.condition!r}"
            )

    @property
    def told(self) -> Condition:
        """The condition that `condition` names."""
        return KNOWN_CONDITIONS[self.condition]

    def to_json(self) -> str:
        """unet.json: with the tensors it is the whole model."""
        return json.dumps({**asdict(self), "unet": self.unet.to_dict()}, indent=2)

    @staticmethod
    def from_json(text: str) -> DenoiserSpec:
        """The inverse of `to_json`. Raises ValueError if the text is no unet.json."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a unet.json: {error}") from error
        known = {field.name for field in fields(DenoiserSpec)}
        if not isinstance(values, dict) or not isinstance(values.get("unet"), dict):
            raise ValueError("not a unet.json: there is no entry 'unet' with the shape of the U-Net")
        if unknown := sorted(set(values) - known):
            raise ValueError(f"not a unet.json: unknown entry {unknown[0]!r}")
        try:
            return DenoiserSpec(**{**values, "unet": UNetSpec.from_dict(values["unet"])})
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a unet.json: {error}") from error


def perceptron(inputs: int, embedding: int) -> nn.Sequential:
    """Linear-SiLU-Linear: [..., inputs] -> [..., E]."""
    return nn.Sequential(nn.Linear(inputs, embedding), nn.SiLU(), nn.Linear(embedding, embedding))


class PathEncoder(nn.Module):
    """A path of the tree -> y [B, E], the condition. Holds only the networks that the condition needs."""

    def __init__(
        self,
        told: Condition,
        embedding: int,
        node_encoding: NodeEncoding,
        nodes: int,
        latent_size: int,
        null: bool = False,
    ):
        super().__init__()
        if not told.embeds:
            raise ValueError("a condition without leaf, latent or path has no embedding to compute")
        self.whole_path = told.path
        self.f_embed = perceptron(latent_size, embedding) if told.embeds_latents else None
        self.f_node: nn.Sequential | None = None
        self.node_vectors: nn.Embedding | None = None
        if told.embeds_nodes:
            by_index = node_encoding == "index"
            self.f_node = perceptron(1 if by_index else embedding, embedding)
            self.node_vectors = None if by_index else nn.Embedding(nodes, embedding)
        # Zero: a dropped condition starts as the time embedding alone.
        self.null = nn.Parameter(torch.zeros(embedding)) if null else None

    def forward(self, path: Path, drop: Tensor | None = None) -> Tensor:
        """Latents and nodes of a path, padded with node -1 at the end -> y [B, E] float32.

        drop: [B] bool, the samples that are told the null condition instead; ValueError if there is none.
        """
        if drop is not None and self.null is None:
            raise ValueError("samples are to be dropped, but this denoiser has no null condition: train it with null")
        z, nodes = path.z.flatten(2), path.nodes  # [B, P, D r r], [B, P]
        if not self.whole_path:
            rows = torch.arange(len(nodes), device=nodes.device)
            last = (nodes >= 0).sum(1) - 1  # [B], where the leaf stands
            z, nodes = z[rows, last, None], nodes[rows, last, None]  # P = 1
        # Full precision whatever the caller's autocast: in bf16 the indices 256 and 257 are the same number.
        with torch.autocast(z.device.type, enabled=False):
            terms = torch.zeros((), device=z.device)
            if self.f_embed is not None:
                terms = terms + self.f_embed(z.float())  # [B, P, E]
            if self.f_node is not None:
                places = nodes.clamp_min(0)
                terms = terms + self.f_node(
                    places.float()[..., None] if self.node_vectors is None else self.node_vectors(places)
                )  # [B, P, E]
            y = torch.where((nodes >= 0)[..., None], terms, 0.0).sum(1)  # [B, E]
        if self.null is None:
            return y
        if drop is None:
            # Still through the null vector: every parameter must have a gradient in every step.
            drop = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        return torch.where(drop[:, None], self.null, y)


class Denoiser(nn.Module):
    """The U-Net and the encoder of its condition: all the parameters of stage 2."""

    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        self.spec = spec
        self.unet = UNet(spec.unet)
        self.path_encoder: PathEncoder | None = None
        if spec.told.embeds:
            self.path_encoder = PathEncoder(
                spec.told, spec.unet.embedding_size, spec.node_encoding, spec.nodes, spec.latent_size, spec.null
            )

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        path: Path | None = None,
        recon: Tensor | None = None,
        drop: Tensor | None = None,
    ) -> Tensor:
        """What a process tells the network (`Process.network_input`): images [B, I, H, H], a number for the time [B] ->
        its answer, [B, I, H, H] float32.

        path (of a control: `label_path`) and recon (the leaf's reconstruction, [B, I, H, H] in [0, 1]) are read only
        where the condition asks for them. drop: [B] bool, samples told nothing of either. Raises ValueError if what the
        condition needs is missing.
        """
        told = self.spec.told
        if (told.recon and recon is None) or (told.embeds and path is None):
            raise ValueError(
                f"condition {self.spec.condition!r} needs {'recon' if recon is None and told.recon else 'path'}"
            )
        if drop is not None and not self.spec.null:
            raise ValueError("samples are to be dropped, but this denoiser has no null condition: train it with null")
        y = None if self.path_encoder is None else self.path_encoder(path, drop)
        beside = None
        if told.recon and recon is not None:
            beside = (2 * recon - 1).clamp(-1, 1)
            if drop is not None:
                beside = torch.where(drop[:, None, None, None], 0.0, beside)
        out: Tensor = self.unet(x_t, t, y, beside)
        return out
