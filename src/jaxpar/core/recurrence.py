"""States that follow each other by affine maps, all at once."""

import jax


def prefix(decay, inputs):
    """What n steps of s_i = decay_i s_{i-1} + inputs_i make of the state before the first.

    Args:
        decay, inputs: `[n, ..]`, the same shape and dtype.

    Returns:
        `(products, states)`, each `[n, ..]`: s_i = products_i s + states_i, with s the state before the first step.

    Source: Blelloch 1990, CMU-CS-90-190, section 1.4.1.
    """

    def after(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(after, (decay, inputs))
