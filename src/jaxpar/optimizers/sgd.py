"""Stochastic gradient descent with momentum."""

import optax

from jaxpar.core.refuse import Problem, Refused


def sgd(
    learning_rate: optax.Schedule, weight_decay: float, decayed, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
    """With g = gradient + weight_decay x weight and v = momentum v + g: a weight loses learning_rate x v.

    So decay is coupled: it goes through the momentum, as in torch.optim.SGD, and the rate of the step applies to all of
    v. Under `nesterov` a weight loses learning_rate x (g + momentum v).

    Args:
        learning_rate: from the number of updates done to the rate.
        weight_decay: times the weight, added to its gradient.
        decayed: tree of booleans like the parameters: which leaves decay.
        momentum: what is kept of v, 0 to below 1; 0: no v is kept.
        nesterov: whether to look ahead.

    Raises:
        Refused: if the momentum is out of range, or there is none to look ahead with.

    Source: Sutskever et al. 2013, section 2, in the form of torch.optim.SGD.
    """
    if not 0 <= momentum < 1:
        raise Refused([Problem("optimizer", f"sgd:momentum={momentum}", "must lie in [0, 1).", "sgd:momentum=0.9")])
    if nesterov and not momentum:
        raise Refused([Problem("optimizer", "sgd:nesterov=true", "needs a momentum above 0.", "sgd:nesterov=true")])
    step = optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(weight_decay, decayed), step)
