"""One loss scale for the whole run."""

import jax.numpy as jnp

from jaxpar.core.types import LossScale


def static(scale: float) -> LossScale:
    """Always `scale`; a step whose gradients are no numbers is skipped, and the next one scaled as it was.

    Args:
        scale: what gradients are multiplied by; a power of two rounds nothing by itself.

    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2.
    """
    return LossScale(lambda: (), lambda state: jnp.float32(scale), lambda state, fine: state)
