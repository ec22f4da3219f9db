"""Stochastic gradient descent with momentum."""

import optax


def sgd(learning_rate: optax.Schedule, weight_decay: float, decayed) -> optax.GradientTransformation:
    """Momentum 0.9; weight decay is added to the gradient before it.

    Args:
        learning_rate: from the number of updates done to the rate.
        weight_decay: times the weight, added to its gradient.
        decayed: tree of booleans like the parameters: which leaves decay.

    Source: Sutskever et al. 2013, section 2, in the form of torch.optim.SGD.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay, decayed), optax.sgd(learning_rate, momentum=0.9))
