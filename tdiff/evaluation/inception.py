"""InceptionV3, whose features FID is measured in: torch-fidelity's, from weights that were read without unpickling.

Legend: B batch, I image channels, H image size, F = 2048 features.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

FEATURES = 2048


def weights_source() -> str:
    """Where torch-fidelity downloads the weights from."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    source: str = URL_INCEPTION_V3
    return source


def read_weights(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` or safetensors has written; nothing in it is executed.

    Raises ValueError if it is neither, or holds anything but tensors by name.
    """
    if content[:2] != b"PK" and content[8:9] == b"{":  # a safetensors file: 8 bytes of length, then JSON
        try:
            return load_safetensors(content)
        except SafetensorError as error:
            raise ValueError(f"it is no file of tensors ({error})") from error
    try:
        weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"it is no file of tensors ({' '.join(str(error).split())[:150]})") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("it holds more than tensors by name")
    return weights


class Inception(nn.Module):
    """uint8 images [B, I, H, H] of 1 or 3 channels -> features [B, F]; they are resized to 299 px inside."""

    def __init__(self, weights: Mapping[str, Tensor]):
        """Raises ValueError if the weights are not InceptionV3's."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # a second of imports

        super().__init__()
        # torch-fidelity unpickles whatever its file holds, so it gets one that was written here.
        with NamedTemporaryFile(suffix=".pth") as file:
            torch.save(dict(weights), file.name)
            try:
                self.body = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], file.name)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:150]
                raise ValueError(f"it does not hold the weights of InceptionV3 ({reason})") from error

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        (features,) = self.body(images)
        found: Tensor = features
        return found
