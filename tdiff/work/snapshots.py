"""Snapshots of the EMAs of the diffusion model's weights, and what they are for: any other width, after training.

    weights = rebuild("runs/NAME/diffusion", sigma_rel=0.07)
    denoiser.load_state_dict(weights)

Training leaves, at regular steps, its two power-function EMAs as they are then (`diffusion.snapshots` times):

    RUN/diffusion/ema/index.json                  {"steps": [...], "widths": [0.05, 0.1]}: all that a finished run has
                      000000037-0.05.safetensors  named fp32 tensors, as in ema.safetensors; step and width in its name
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from tdiff import storage
from tdiff.diffusion.ema import TRACKS, Profile, combination, gamma_from_width
from tdiff.errors import ConfigError, DataError

log = logging.getLogger(__name__)

INDEX = "index.json"
OF_STEP = re.compile(r"(\d{9})-")
"""The beginning of a snapshot's file name, also while it is written."""

COARSE = 0.1
"""Distance between the profile that is wanted and the one that is found (`combination`) above which users are told."""


def file_name(step: int, width: float) -> str:
    return f"{step:09d}-{width}.safetensors"


@dataclass(frozen=True)
class Snapshots:
    """Writes the snapshots of one training (a `tdiff.engine.Snapshots`), each whole or not at all.

    url: their folder; steps: after which they are taken; prefix: left out of the tensors' names.
    """

    url: str
    steps: Sequence[int]
    prefix: str

    @property
    def tracks(self) -> list[str]:
        return [str(width) for width in TRACKS]

    def start(self, step: int) -> None:
        """Writes the index, and removes what a killed run wrote after the step from which training goes on."""
        index = {"steps": list(self.steps), "widths": TRACKS}
        storage.write_text(storage.join(self.url, INDEX), json.dumps(index) + "\n")
        for name in storage.listing(self.url):
            if (found := OF_STEP.match(name)) and int(found[1]) > step:
                storage.remove(storage.join(self.url, name))

    def write(self, step: int, track: str, average: Mapping[str, Tensor]) -> None:
        tensors = {name.removeprefix(self.prefix): tensor for name, tensor in average.items()}
        storage.write_bytes(storage.join(self.url, file_name(step, float(track))), save_tensors(tensors))


def rebuild(folder_url: str, sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The denoiser's weights averaged by a power function of any width, from the snapshots of a training.

    folder_url: the diffusion model's folder, RUN/diffusion, local or s3://. sigma_rel: standard deviation of the
    average's profile as a fraction of the run, in (0, 0.2886]; the widths that were followed, 0.05 and 0.1, come back
    to the last bit. step: one after which a snapshot was taken, for the average at that point of the run; default: the
    last one. Returns float32 tensors on the CPU, by the names that `Denoiser.load_state_dict` and ema.safetensors have.

    Adds up what `recipe` names, in float64, with one snapshot beside the sum in memory. Raises what `recipe` raises,
    and DataError if a snapshot is damaged.
    """
    total: dict[str, Tensor] = {}
    for file, coefficient in recipe(folder_url, sigma_rel, step).items():
        snapshot = storage.read_tensors(file)
        total = total or {name: torch.zeros_like(t, dtype=torch.float64) for name, t in snapshot.items()}
        if {name: t.shape for name, t in snapshot.items()} != {name: t.shape for name, t in total.items()}:
            raise DataError(f"{file} is damaged: its tensors are not those of the first snapshot")
        for name, tensor in snapshot.items():
            total[name].add_(tensor, alpha=coefficient)
    return {name: tensor.float() for name, tensor in total.items()}


def recipe(folder_url: str, sigma_rel: float, step: int | None = None) -> dict[str, float]:
    """Which snapshots make up an average, with their coefficients: URL -> coefficient, for the arguments of `rebuild`.

    The sum of the snapshots up to `step` whose profile is nearest to the wanted one (EDM2, algorithm 3). Says so in
    the log if that is not near (`COARSE`): narrow widths need more `diffusion.snapshots`. Reads the index alone, so
    that what cannot be rebuilt is known early.

    Raises ConfigError if there are no snapshots, or none of that step, or for a width out of range; DataError if a
    snapshot is missing or the index damaged; StorageError.
    """
    url = storage.join(folder_url, "ema")
    steps, widths = _index(url)
    step = steps[-1] if step is None else step
    if step not in steps:
        nearest = min(steps, key=lambda s: abs(s - step))
        raise ConfigError(f"step={step} has no EMA snapshot in {url}: take one that has, such as {nearest}")
    try:
        wanted = Profile(step, gamma_from_width(sigma_rel))
    except ValueError as error:
        raise ConfigError(f"sigma_rel={sigma_rel} cannot be rebuilt: {error}") from error
    kept = [(s, width) for s in steps if s <= step for width in widths]
    if sigma_rel in widths:
        kept = [(step, sigma_rel)]  # exact, and one file to read
    there = set(storage.listing(url))
    for s, width in kept:
        if (name := file_name(s, width)) not in there:
            raise DataError(f"{storage.join(url, name)} is missing")
    coefficients, distance = combination(wanted, [Profile(s, gamma_from_width(width)) for s, width in kept])
    if distance > COARSE:
        log.warning(
            "the EMA of width %g at step %d is only near: its profile is %.0f%% off, for %d snapshots; "
            "more diffusion.snapshots in training would bring it nearer",
            *(sigma_rel, step, 100 * distance, len(kept) // len(widths)),
        )
    return {storage.join(url, file_name(*k)): x for k, x in zip(kept, coefficients, strict=True)}


def _index(url: str) -> tuple[list[int], list[float]]:
    """Steps, ascending, and widths of a training's snapshots."""
    file = storage.join(url, INDEX)
    try:
        index = storage.read_json(file)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{url} has no EMA snapshots, from which other widths can be rebuilt: train with diffusion.snapshots=16"
        ) from error
    steps, widths = index.get("steps"), index.get("widths")
    if not (_positive(steps) and _positive(widths)):
        raise DataError(f"{file} is damaged: it does not tell steps and widths")
    return sorted(steps), widths


def _positive(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value of JSON is a list of positive numbers, and not empty."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, int | float) and v > 0 for v in value)
