"""Precision and recall of generated images, by nearest neighbours in feature space (Kynkäänniemi et al., 2019).

Legend: M generated images, N real images, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

NEIGHBOURS = 3
"""The ball round an image reaches to its third neighbour, as in the paper and torch-fidelity."""

ROWS = 1000
"""Rows of the distance matrix at a time: 80 MB where it is 10,000 images wide."""


class PrecisionRecall(NamedTuple):
    precision: float
    """Share of generated images that lie in a real image's ball: how real they are."""
    recall: float
    """Share of real images that lie in a generated image's ball: how much of the data they cover."""


def precision_recall(generated: NDArray[np.floating], real: NDArray[np.floating]) -> PrecisionRecall:
    """Of features [M, F] and [N, F]. Raises ValueError if there are no more images than neighbours on a side."""
    from torch_fidelity.metric_prc import (  # slow to import
        KEY_METRIC_PRECISION,
        KEY_METRIC_RECALL,
        prc_features_to_metric,
    )

    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= NEIGHBOURS:
            raise ValueError(f"precision and recall need more than {NEIGHBOURS} {name} images, not {len(features)}")
    found = prc_features_to_metric(
        torch.as_tensor(generated).float(),
        torch.as_tensor(real).float(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    return PrecisionRecall(found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL])
