"""State of a backward pass in a loop over time: what each position leaves is what the position before it begins with.

The new state is the cotangent of the old one, so a loop that carries it takes it against time by itself. What is
carried forward has no meaning; so it is zeros.
"""

import jax
import jax.numpy as jnp

from jaxpar.core import compat


def halves(states: dict) -> tuple[dict, dict]:
    """What norms keep of the forward pass, and of the backward pass those that do."""
    running = {name: {key: half for key, half in one.items() if key != "backward"} for name, one in states.items()}
    return running, {name: one["backward"] for name, one in states.items() if "backward" in one}


def merged(running: dict, control: dict) -> dict:
    """The states whose halves these are."""
    return {name: one | ({"backward": control[name]} if name in control else {}) for name, one in running.items()}


@jax.custom_vjp
def begun(state):
    """Zeros in place of the state of a backward pass, for a loop to carry: only their cotangent, the state, counts.

    So nothing that the loop keeps has read the state, which another microbatch may change before the way back.
    """
    return jax.tree.map(lambda leaf: compat.vary(jnp.zeros_like(leaf), compat.varying_axes(leaf)), state)


begun.defvjp(lambda state: (begun(state), None), lambda _, cotangent: (cotangent,))


@jax.custom_vjp
def ended(h, carried, control):
    """(h, the state), behind the loop; back, the loop begins with it, or with what a later use has made of it.

    Args:
        h: what the loop made: its gradient is what sets the way back going.
        carried: what came out of the loop in place of `control`.
        control: the state of each norm, with the number of its `passes`.
    """
    return h, control


def _ended_back(control, cotangents):
    dh, later = cotangents
    now = {
        name: jax.tree.map(lambda new, old, used=later[name]["passes"] > 0: jnp.where(used, new, old), later[name], one)
        for name, one in control.items()
    }
    return dh, now, None


ended.defvjp(lambda h, carried, control: ((h, control), control), _ended_back)
