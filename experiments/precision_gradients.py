"""How small are gradients, and which of them does a policy lose?  Half of `experiments/precision.py`, which runs it."""

from collections import Counter
from functools import partial

LOW, HIGH = -50, 16  # exponents that are told apart
RANGES = {  # smallest subnormal, smallest normal and largest number of a format, as powers of two
    "fp16": (-24, -14, 15),
    "e5m2": (-16, -14, 15),
    "e4m3": (-9, -6, 8),
}


def of_float32(parts, state, batch) -> dict:
    """Gradients of one step in float32, as they enter products, and of weights.

    Args:
        parts: of a run on one device in float32.
        state: between two steps.
        batch: as `Program.place` gives it.

    Returns:
        `"activation"`: (name of the product, gradient of its result) of each product, on the host; `"weight"`: the
        gradients of all parameters, flat.
    """
    import jax
    import numpy as np

    from jaxpar.step.program import program

    policy, seen = parts.settings.policy, []

    def enter(a, site):
        if site.role == "gradient":
            jax.debug.callback(lambda value, name=site.name: seen.append((name, np.asarray(value))), a)
        return policy.enter(a, site)

    watched = parts.settings._replace(policy=policy._replace(enter=enter))
    found = program(parts._replace(settings=watched)).gradients(state, batch).gradients
    jax.effects_barrier()
    weights = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(found))])
    return {"activation": seen, "weight": weights}


def flushed(policy, gradients: dict, scale: float, seed: int) -> dict[str, float]:
    """Shares of the gradients of float32 that are not 0 and that a policy makes 0, if it scales the loss.

    Those of activations by its own `enter`, on one device; those of weights as results of products.

    Args:
        policy: a `Policy`.
        gradients: of `of_float32`.
        scale: of the loss.
        seed: of stochastic rounding.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxpar.core.policy import Site

    def lost(before, after):
        return int(np.sum((before != 0) & (after == 0))), int(np.sum(before != 0))

    def entered(a, name, role, history=None, bits=None):
        site = Site(name, role, (1,) * a.ndim, lambda value, dims=None: value, bits, history)
        return policy.enter(policy.cast(jnp.asarray(a), "activation"), site)

    counts = []
    for number, (name, gradient) in enumerate(gradients["activation"]):
        scaled, history = gradient * np.float32(scale), None
        bits = partial(jax.random.bits, jax.random.fold_in(jax.random.key(seed), number), gradient.shape, jnp.uint32)
        if policy.history:  # delayed scaling has seen this gradient once
            history = policy.history()
            history = policy.remember(history, entered(scaled, name, "gradient", history, bits)[1])
        operand, _ = entered(scaled, name, "gradient", history, bits)
        counts.append(lost(gradient, np.asarray(operand.values.astype(jnp.float32))))
    one = entered(np.ones((1, 1), np.float32), "embed mlp", "activation", bits=lambda: jnp.zeros((1, 1), jnp.uint32))[0]
    result = policy.dot(
        lambda a, b, dtype, precision=None: jnp.matmul(a, b, preferred_element_type=dtype), one, one
    ).dtype
    weights = gradients["weight"]
    kept = np.asarray((weights * np.float32(scale)).astype(result).astype(np.float32))
    if policy.gradient:
        kept = np.asarray(policy.gradient(jnp.asarray(kept), "embed mlp"))
    missing, whole = map(sum, zip(*counts, strict=True))
    missing_weights, whole_weights = lost(weights, kept)
    return {"activation": missing / whole, "weight": missing_weights / whole_weights}


def histogram(values) -> dict:
    """How many of `values` are 0, and how many have which exponent, as shares of all; ends collect what lies beyond."""
    import numpy as np

    values = np.concatenate([np.ravel(one) for one in values])
    exponents = np.clip(np.frexp(values[values != 0])[1] - 1, LOW, HIGH)
    counts = Counter(exponents.tolist())
    shares = [(exponent, counts[exponent] / values.size) for exponent in range(LOW, HIGH + 1)]
    return {"zero": float(np.mean(values == 0)), "largest": int(exponents.max()), "shares": shares}


def below(found: dict, exponent: int) -> float:
    """Share of those that are not 0 which lie below a power of two."""
    return sum(share for at, share in found["shares"] if at < exponent) / (1 - found["zero"])


def draw(axes, found: dict[str, dict], names: dict[str, str]) -> None:
    """Exponents of gradients as lines, and the ranges of formats as bars above them."""
    from jaxpar.report.pictures import COLORS

    top = max(share for one in found.values() for _, share in one["shares"])
    for number, (key, one) in enumerate(found.items()):
        exponents, shares = zip(*((at, share) for at, share in one["shares"] if at > LOW), strict=True)
        look = {"color": COLORS[number // 2], "ls": "-" if number % 2 == 0 else ":"}
        axes.plot(exponents, [100 * share for share in shares], label=names[key], lw=1.5, **look)
    for number, (name, (smallest, normal, largest)) in enumerate(RANGES.items()):
        at = 100 * top * (1.1 + 0.1 * number)
        axes.plot([normal, largest + 1], [at, at], color="#616161", lw=5, solid_capstyle="butt")
        axes.plot([smallest, normal], [at, at], color="#616161", lw=5, alpha=0.35, solid_capstyle="butt")
        axes.annotate(name, (largest + 1.5, at), fontsize=8, va="center", annotation_clip=False)
    axes.set(xlabel="exponent: 2^n", ylabel="% of gradients", xlim=(LOW + 1, HIGH + 6))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.82))
    axes.set_title("gradients of float32, and what formats hold (pale: subnormal)", loc="left", fontsize=10)
