"""Protects FID's features: they are torch-fidelity's, on grey images too, and a file of weights is never executed."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from inception_weights import random_inception
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from tdiff.evaluation.inception import FEATURES, Inception, read_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def test_features_are_torch_fidelitys(weights: Path):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    (theirs,) = FeatureExtractorInceptionV3("x", ["2048"], str(weights))(images)
    ours = Inception(read_weights(weights.read_bytes()))(images)
    assert ours.shape == (4, FEATURES)
    assert theirs.abs().mean() > 1e-3
    torch.testing.assert_close(ours, theirs)


def test_grey_images_are_three_equal_channels(weights: Path):
    grey = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 1, 28, 28), dtype=np.uint8))
    inception = Inception(read_weights(weights.read_bytes()))
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))


def test_safetensors_do_as_well(weights: Path, tmp_path: Path):
    tensors = read_weights(weights.read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "w.safetensors")
    again = read_weights((tmp_path / "w.safetensors").read_bytes())
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


class Executed:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("written", ["pickle", "torch"])
def test_a_file_that_executes_does_not(written: str, tmp_path: Path):
    crafted, marker = tmp_path / "crafted.pth", tmp_path / "executed"
    if written == "pickle":
        crafted.write_bytes(pickle.dumps({"weight": Executed(marker)}))
    else:
        torch.save({"weight": Executed(marker)}, crafted)
    with pytest.raises(ValueError, match="no file of tensors"):
        read_weights(crafted.read_bytes())
    assert not marker.exists()


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no file of tensors"):
        read_weights(b"<html>404</html>")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="more than tensors by name"):
        read_weights((tmp_path / "list.pth").read_bytes())
    with pytest.raises(ValueError, match="weights of InceptionV3"):
        Inception({"weight": torch.zeros(2)})
