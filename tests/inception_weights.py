"""A file of random InceptionV3 weights, in the format of torch-fidelity's: the real ones cannot be had everywhere."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def random_inception(file: Path, seed: int = 0) -> Path:
    """Writes the file. He-initialised, since torch's default leaves features of 1e-8."""
    with (
        mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    rng = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=rng)
    torch.save(network.state_dict(), file)
    return file
