"""Products followed by a norm, and norms that follow none."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxpar.core import family, spec
from jaxpar.core.moments import wide
from jaxpar.core.parts import join
from jaxpar.core.refuse import Problem, Refused
from jaxpar.core.types import Layer

FIELD = "model.norm"
OWN = ("width", "dims", "bias")  # arguments of a norm that are the model's to give


def _member(norm: str) -> Callable[..., Layer]:
    return spec.member("norms", norm, FIELD, OWN)


def normalized(linear: Layer, norm: str, width: int, dims: str, after: Callable | None = None) -> Layer:
    """A product without bias, a norm, and an elementwise function.

    A norm whose file says `READS = "squares"` acts on the weights of the product: its `apply` gets
    `x = (y, squares)`, with the sums of squares of the weights of each output. One that says `AFTER` has a map of
    functions: it is applied to `after`.

    Args:
        linear: a product whose one parameter is its weight or kernel.
        norm: a member of norms/, perhaps with arguments, such as `group:groups=8`.
        width: features of the product, over all devices.
        dims: their word, such as `"channels"`.
        after: `after(y)`, such as `jax.nn.relu`; None for none.

    Returns:
        A layer with params `{"product": .., "norm": ..}`.

    Raises:
        Refused: if there is no such norm.
        ValueError: if the product has another parameter, such as a bias, which the norm has.
    """
    make = _member(norm)
    normalize, reads = make(width, dims), family.constant(make, "READS", None)
    after = family.constant(make, "AFTER", lambda function: function)(after) if after else None
    init, names = join({"product": linear, "norm": normalize})
    if len(linear.dims[0]) != 1:
        raise ValueError(f"a product before a norm has one parameter, its weight, and not {sorted(linear.dims[0])}.")
    ((weight, words),) = linear.dims[0].items()

    def apply(params, extra, x, ctx):
        y, _ = linear.apply(params["product"], {}, x, ctx)
        if reads:
            y = (y, squares(ctx, params["product"][weight], words))
        y, state = normalize.apply(params["norm"], extra["norm"], y, ctx)
        return after(y) if after else y, extra | {"norm": state}

    return Layer(init, apply, names)


def squares(ctx, weight, words: str):
    """The sum of squares of the weights of each output, in float32 or wider; lies as a bias does."""
    weight = getattr(weight, "array", weight)  # delayed scaling keeps histories beside it
    return ctx.columns(jnp.square(wide(weight)), " ".join(words.split()[-2:]))


def free(norm: str, *, causal: bool = False, cell: bool = False) -> Callable[..., Layer]:
    """The norm as `make(width, dims, bias)`, for where it follows no product.

    Args:
        norm: a member of norms/, perhaps with arguments.
        causal: whether it stands in a language model, where no position may see a later one.
        cell: whether it stands in a loop over positions.

    Raises:
        Refused: if there is no such norm, if it acts on weights, or if it looks ahead, or is for no loop, and must not.
    """
    make = _member(norm)
    if family.constant(make, "READS", None):
        rule = "acts on the weights of the product before it, and in this model norms follow none."
        raise Refused([Problem(FIELD, norm, rule, "layer, or a model of convolutions such as resnet")])
    if causal and family.constant(make, "AHEAD", False):
        rule = "takes statistics over a whole sequence, so a position would see the tokens that it is to predict."
        raise Refused([Problem(FIELD, norm, rule, "layer, rms or group")])
    if cell and family.constant(make, "ONCE", False):
        rule = "keeps count of microbatches, and inside a cell it would be used once for each position."
        raise Refused([Problem(FIELD, norm, rule, "layer, group, batch or online")])
    return make
