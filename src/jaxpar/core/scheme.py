"""A tensor-parallel scheme is a table of layouts: where activations and weights live, and no code."""

from typing import NamedTuple

Axes = tuple[str, ...]  # mesh axes that split one dim, major first


class Scheme(NamedTuple):
    """Where the arrays of a model live on a mesh; which collectives a matmul needs follows (`plan/matmul.py`).

    An activation is given as (rows, features): the axes that split its rows, then those that split its features. A
    weight is given as (contraction, output). Axes are major first; an axis that is not named holds copies.

    Attributes:
        axes: mesh axes and their sizes, major first.
        outer: the residual stream, between blocks.
        inner: between an up and a down projection: heads, the hidden features of an MLP, logits.
        up: weights from outer to inner.
        down: weights from inner to outer.
        table: the embedding table `"vocab embed"`; by default `up` transposed, so that a tied head is an up projection.
        across: weights from outer to outer, such as a ResNet shortcut; by default split over the contraction only.
        inside: weights from inner to inner, such as a recurrence; by default split over the contraction only.
        enter: weights from whole features to outer, such as an image stem; by default split over the output only.
        context: those outer row axes that lie on the context, rather than the batch, when the context can carry them.
    """

    axes: dict[str, int]
    outer: tuple[Axes, Axes]
    inner: tuple[Axes, Axes]
    up: tuple[Axes, Axes]
    down: tuple[Axes, Axes]
    table: tuple[Axes, Axes] | None = None
    across: tuple[Axes, Axes] | None = None
    inside: tuple[Axes, Axes] | None = None
    enter: tuple[Axes, Axes] | None = None
    context: Axes = ()
