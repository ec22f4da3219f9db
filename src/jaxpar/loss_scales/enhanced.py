"""A dynamic loss scale with a minimum that is raised over time."""

from jaxpar.core.scaling import adaptive
from jaxpar.core.types import LossScale

FLOORS = ((40_000, 8192.0), (150_000, 32768.0))  # (step, smallest scale from it on)


def enhanced(
    floors: tuple[tuple[int, float], ...] = FLOORS,
    start: float = 65536.0,
    interval: int = 2000,
    growth: float = 2.0,
    backoff: float = 0.5,
) -> LossScale:
    """As `dynamic`, but never below a floor: errors in e5m2 flush to zero before scales as low as it would find help.

    A floor holds from its step on, at once: a smaller scale is raised to it. A step that is not finite at the floor is
    skipped as any other, and the scale stays.

    Args:
        floors: (step, smallest scale): by default those of the paper for GNMT. Skipped steps count.
        start, interval, growth, backoff: as of `dynamic`.

    Source: Mellempudi et al. 2019, arXiv:1905.12334, section 3.2.
    """
    return adaptive(start, interval, growth, backoff, tuple(sorted(floors)))
