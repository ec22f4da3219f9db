"""Adam with decoupled weight decay."""

import optax

from jaxpar.core.refuse import Problem, refuse


def adamw(
    learning_rate: optax.Schedule, weight_decay: float, decayed, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8
) -> optax.GradientTransformation:
    """A weight loses learning_rate x (mean of gradients / (root of mean of squares + eps) + weight_decay x weight).

    Args:
        learning_rate: from the number of updates done to the rate.
        weight_decay: share of a weight taken off per update, times the rate.
        decayed: tree of booleans like the parameters: which leaves decay.
        b1, b2: what the means of gradients and of their squares keep, 0 to below 1.
        eps: above 0, in units of a gradient.

    Raises:
        Refused: naming each number that is out of range.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; decay rates of Brown et al. 2020, appendix B.
    """
    refuse(
        Problem("optimizer", f"adamw:{name}={value}", f"must lie in {legal}.", f"adamw:{name}={default}")
        for name, value, fine, legal, default in (
            ("b1", b1, 0 <= b1 < 1, "[0, 1)", 0.9),
            ("b2", b2, 0 <= b2 < 1, "[0, 1)", 0.95),
            ("eps", eps, 0 < eps < 1, "(0, 1)", 1e-8),
        )
        if not fine
    )
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed)
