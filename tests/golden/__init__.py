"""Outputs of reference implementations, as plain numpy; README.md says where each file comes from."""

from functools import lru_cache
from pathlib import Path

import numpy as np


@lru_cache
def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of `name`.npz."""
    with np.load(Path(__file__).parent / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)
