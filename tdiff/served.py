"""A run's tree as an MLflow model, images -> clusters. MLflow runs a copy of this file wherever the model is loaded.

Beside it lie, as the model's artifacts, tree.json and model.safetensors, and this package's code: nothing is a pickle,
and whoever serves the model needs what `tdiff.tracking` names as its requirements, and no installed tdiff.

Legend: M images, L leaves, P nodes on the longest path, I image channels, H image size.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
from safetensors.torch import load_file

from tdiff.hardware import device
from tdiff.tree.encoding import encode
from tdiff.tree.model import TreeVAE


class Clusters(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Float32 images [M, I, H, H] in [0, 1] -> reach [M, L], leaf [M], path [M, P]: `tdiff.tree.encoding.Encoded`."""

    def load_context(self, context: Any) -> None:
        files = context.artifacts
        self.tree = TreeVAE.from_json(Path(files["tree"]).read_text())
        self.tree.load_state_dict(load_file(files["weights"]))
        self.tree.eval().to(device())

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> dict[str, np.ndarray]:
        return encode(self.tree, model_input)._asdict()


mlflow.models.set_model(Clusters())
