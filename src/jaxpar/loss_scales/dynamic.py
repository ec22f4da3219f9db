"""A loss scale that grows until gradients overflow, and then falls."""

from jaxpar.core.scaling import adaptive
from jaxpar.core.types import LossScale


def dynamic(start: float = 65536.0, interval: int = 2000, growth: float = 2.0, backoff: float = 0.5) -> LossScale:
    """Times `growth` after `interval` finite steps in a row, times `backoff` after each that is not.

    It has no lower bound, as `torch.amp.GradScaler`, whose numbers these are: see `train/metrics.py` for when a run
    stops that cannot be helped so.

    Args:
        start: the first scale.
        interval: finite steps before it grows.
        growth: by how much, at least 1.
        backoff: by how much it falls, below 1.

    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2, in the form of torch.amp.GradScaler.
    """
    return adaptive(start, interval, growth, backoff)
