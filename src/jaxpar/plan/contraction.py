"""Products of which the operands are rounded before they travel, forward and back.

One rule of differentiation stands around all of it: cast, gather, multiply, scatter; and back: round the gradient,
gather it, multiply twice, scatter. So a policy says what travels in each direction, in which dtype, and gradients of
8 bits are never added up as such.
"""

import dataclasses
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpar.core import compat
from jaxpar.core.policy import Operand, Site
from jaxpar.plan import layout
from jaxpar.plan.bilinear import Bilinear
from jaxpar.plan.draws import counters
from jaxpar.plan.layout import Layout


@partial(jax.tree_util.register_dataclass, data_fields=["array", "histories"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Recorded:
    """A weight with what delayed scaling kept of the operands of its product.

    Attributes:
        array: the weight.
        histories: by role, `Policy.history`; without `"activation"` where an earlier weight of the same call has it.
    """

    array: Any
    histories: dict[str, Any]

    @property
    def T(self) -> "Recorded":
        """Transposed, as a tied head reads the token table."""
        return dataclasses.replace(self, array=self.array.T)


@dataclasses.dataclass(frozen=True)
class Way:
    """How the operands of one product move; functions on an array of any dtype, but `back` on an `Operand`.

    Attributes:
        name: of the product, such as `"embed mlp"`.
        lies: layouts of x, w and y.
        x: `x(a)`: x as the local product wants it; products with equal `shares` share it.
        w: the same for w; the identity where it is held.
        y: `y(a)`: from the local product to y.
        back: from the gradient of y to that of the local product.
        shares: what tells moves of x apart.
    """

    name: str
    lies: tuple[Layout, Layout, Layout]
    x: Callable
    w: Callable
    y: Callable
    back: Callable
    shares: Any


def contract(settings, form: Bilinear, ways: list[Way], x, weights: tuple, histories: tuple) -> list:
    """x times each weight.

    Args:
        settings: `Settings`.
        form: matrices or convolutions.
        ways: one for each weight.
        x: cast.
        weights: cast.
        histories: of each weight, by role; {} for none.
    """
    policy = settings.policy
    likes = jax.typeof(x), tuple(map(jax.typeof, weights))

    def entered(a, way, role, number, history, draw):
        return policy.enter(a, site(_drawing(settings, draw), way, role, number, a, history.get(role)))

    def local(x, weights, histories, draw):
        x_in, x_seen = entered(x, ways[0], "activation", 0, histories[0] if histories else {}, draw)
        seen, results, kept = {}, [], []
        for number, (way, w, history) in enumerate(zip(ways, weights, histories, strict=True)):
            if way.shares not in seen:
                seen[way.shares] = moved(way.x, x_in)
            w_in, w_seen = entered(w, way, "weight", number, history, draw)
            w_in = moved(way.w, w_in)
            results.append(way.y(form.forward(policy.dot, seen[way.shares], w_in)))
            kept.append((w_in, w_seen))
        return results, (list(seen.values()), x_seen, kept, histories, draw)

    @jax.custom_vjp
    def product(x, weights, histories, draw):
        return local(x, weights, histories, draw)[0]

    def backward(residuals, gradients):
        seen, x_seen, kept, histories, draw = residuals
        order = list(dict.fromkeys(way.shares for way in ways))
        by_x, by_w, news = [None] * len(order), [], []
        for number, (way, dy, (w_in, w_seen), history) in enumerate(zip(ways, gradients, kept, histories, strict=True)):
            dy_in, dy_seen = entered(dy, way, "gradient", number, history, draw)
            dy_in, place = way.back(dy_in), order.index(way.shares)
            x_in = seen[place]
            dx = form.by_x(policy.dot, dy_in, w_in, jax.typeof(x_in.array))
            by_x[place] = dx if by_x[place] is None else by_x[place] + dx
            dw = form.by_w(policy.dot, x_in, dy_in, jax.typeof(w_in.array))
            by_w.append(_pulled(way.w, likes[1][number], dw))
            found = {"activation": x_seen, "weight": w_seen, "gradient": dy_seen}
            new = {role: policy.remember(old, _agreed(found[role], old)) for role, old in history.items()}
            news.append(jax.tree.map(_alike, new, history))
        first = {way.shares: way.x for way in reversed(ways)}
        parts = [_pulled(first[shares], likes[0], dx) for shares, dx in zip(order, by_x, strict=True)]
        return sum(parts[1:], parts[0]), tuple(by_w), tuple(news), None

    product.defvjp(local, backward)
    return product(x, tuple(weights), tuple(histories), _draw(settings))


def _draw(settings):
    """What random bits depend on, as arrays: the backward pass of a loop is none of the trace that its key is of."""
    return (jax.random.key_data(settings.key), settings.first_example) if _draws(settings) else None


def _drawing(settings, draw):
    """Settings with what `_draw` took from them."""
    return settings._replace(key=jax.random.wrap_key_data(draw[0]), first_example=draw[1]) if draw else settings


def _draws(settings) -> bool:
    return settings.policy.draws and settings.key is not None


def site(settings, way: Way, role: str, number: int, a, history) -> Site:
    """What a policy may ask about one operand of a product.

    Args:
        settings: `Settings`.
        way: of the product.
        role: of the operand.
        number: of the weight among those that share x.
        a: the operand.
        history: of it.
    """
    lies = way.lies[("activation", "weight", "gradient").index(role)]
    lies = (*((),) * (a.ndim - len(lies)), *lies)

    def largest(value, dims=None):
        chosen = lies if dims is None else [lies[dim] for dim in dims]
        axes = tuple(axis for axis in layout.axes_of(tuple(chosen)) if axis in compat.varying_axes(value))
        return settings.wire.largest(value, axes, f"scale of the {role} of {way.name}")

    def bits():
        key = jax.random.fold_in(settings.key, zlib.crc32(f"{role} {number} of {way.name}".encode()))
        return compat.random_bits(key, *counters(settings, a.shape, lies, examples=role != "weight"))

    parts = tuple(layout.size(settings.placement.scheme, axes) for axes in lies)
    return Site(way.name, role, parts, largest, bits if _draws(settings) else None, history)


def moved(move: Callable, operand: Operand) -> Operand:
    """An operand after moves: its array, and along the dims that it has entries for, its scale."""
    if operand.scale is None or not operand.along:
        return dataclasses.replace(operand, array=move(operand.array))
    return dataclasses.replace(operand, array=move(operand.array), scale=move(operand.scale, operand.along))


def stay(a, along=None):
    """The move of an operand that lies where it is wanted."""
    return a


def _pulled(move: Callable, like, cotangent):
    """The cotangent of what a move takes, in the dtype in which it comes; summed over axes that only it varies over."""
    if move is stay:  # there is nothing to trace
        extra = tuple(axis for axis in compat.varying_axes(cotangent) if axis not in compat.varying_axes(like))
        found = lax.psum(cotangent, extra) if extra else cotangent
        return compat.vary(found.astype(like.dtype), compat.varying_axes(like))
    start = like.update(dtype=cotangent.dtype)
    cotangent = compat.vary(cotangent, compat.varying_axes(jax.eval_shape(move, start)))
    found = jax.linear_transpose(lambda a: compat.vary(move(a), compat.varying_axes(cotangent)), start)(cotangent)[0]
    return compat.vary(found.astype(like.dtype), compat.varying_axes(like))


def _agreed(seen, history):
    """What was seen of an operand, the largest on all devices that have one history of it."""
    own = {axis for leaf in jax.tree.leaves(history) for axis in compat.varying_axes(leaf)}

    def one(leaf):
        extra = tuple(axis for axis in compat.varying_axes(leaf) if axis not in own)
        return lax.pmax(leaf, extra) if extra else leaf

    return jax.tree.map(one, seen)


def _alike(new, old):
    """A new history that is typed as the old one."""
    return compat.vary(new, compat.varying_axes(old)).astype(jnp.result_type(old))
