"""Adam with decoupled weight decay."""

import optax


def adamw(learning_rate: optax.Schedule, weight_decay: float, decayed) -> optax.GradientTransformation:
    """Decay rates 0.9 and 0.95, eps 1e-8.

    Args:
        learning_rate: from the number of updates done to the rate.
        weight_decay: share of a weight taken off per update, times the rate.
        decayed: tree of booleans like the parameters: which leaves decay.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; decay rates of Brown et al. 2020, appendix B.
    """
    return optax.adamw(learning_rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=weight_decay, mask=decayed)
