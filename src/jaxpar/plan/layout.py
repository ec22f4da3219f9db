"""From dim words to mesh axes: where each dim of an activation or a parameter lies."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxpar.core.refuse import near_miss
from jaxpar.core.scheme import Axes, Scheme

Layout = tuple[Axes, ...]  # the mesh axes of each dim of an array, major axis first

ROWS = ("batch", "context", "depth", "height", "width")
INNER = ("mlp", "heads", "kv_heads", "vocab", "channels")
ROWS_OF_RANK = {
    1: (),
    2: ("batch",),
    3: ("batch", "context"),
    4: ("batch", "height", "width"),
    5: ("batch", "depth", "height", "width"),
}
WORDS = (*ROWS, "embed", *INNER, "layers", "replicas", "experts", "-")
PIPE = "pipe"  # the axis of a pipeline's devices
GROUP = "group"  # where ZeRO shares out a part of the data axis: the devices that share one copy
FILLER = -1  # in a stack: a place that holds no layer


class Placement(NamedTuple):
    """A scheme set down on a model: with its data axis, without axes of size 1.

    Attributes:
        scheme: the layouts, rows of both sides led by `data`.
        on_context: outer row axes that lie on the context instead of the batch.
        whole: dims of the model that are not split since they are too small, such as few key-value heads.
        stack: which layer of the model's stack lies at each place of a leading `layers` dim, `FILLER` for a row of
            zeros; the places lie over the axis `pipe`. Empty: as on disk, whole on every device.
    """

    scheme: Scheme
    on_context: Axes = ()
    whole: frozenset[str] = frozenset()
    stack: tuple[int, ...] = ()


# All whole, on no axes: what one device sees that is alone, or a program on global arrays.
SINGLE = Placement(Scheme(axes={}, outer=((), ()), inner=((), ()), up=((), ()), down=((), ())))


def place(
    scheme: Scheme,
    data: int,
    sizes: Mapping[str, int],
    pipe: int = 1,
    stack: tuple[int, ...] = (),
    group: int = 1,
) -> Placement:
    """Lead both row layouts by the data axes, drop axes of size 1, and decide what lies on the context.

    Args:
        scheme: layouts without the axes `data`, `group` and `pipe`.
        data: size of the data axis.
        sizes: entries of each dim of the model that has one: `batch` (per microbatch), `context`, `kv_heads`, ...
        pipe: size of the pipeline axis, the first of the mesh: what it sends is the least.
        stack: as in `Placement`: as many places on each device of `pipe`.
        group: size of the minor part of the data axis over which ZeRO splits state, if it is not all of it; else 1.

    Raises:
        ValueError: if `stack` lacks a layer, has one twice, or does not divide.
    """
    if sorted(layer for layer in stack if layer != FILLER) != [*range(max(stack, default=-1) + 1)] or len(stack) % pipe:
        raise ValueError(
            f"stack={stack} must hold each layer once, {FILLER} at all other places, and as many places on each of "
            f"{pipe} devices."
        )
    axes = {
        axis: size
        for axis, size in {PIPE: pipe, "data": data // group, GROUP: group, **scheme.axes}.items()
        if size > 1
    }

    def kept(pair):
        return pair and tuple(tuple(axis for axis in dim if axis in axes) for dim in pair)

    def led(pair):
        rows, features = kept(pair)
        return tuple(axis for axis in ("data", GROUP) if axis in axes) + rows, features

    weights = {field: kept(getattr(scheme, field)) for field in ("up", "down", "table", "across", "inside", "enter")}
    found = scheme._replace(axes=axes, outer=led(scheme.outer), inner=led(scheme.inner), **weights)
    found = found._replace(context=tuple(axis for axis in scheme.context if axis in axes))
    split = size(found, found.inner[1])
    whole = frozenset({"kv_heads"} if sizes.get("kv_heads", split) % split else ())
    return Placement(found, _on_context(found, sizes), whole, tuple(stack))


def _on_context(scheme: Scheme, sizes: Mapping[str, int]) -> Axes:
    """The first choice of axes on the context that divides both batch and context; else the scheme's own."""
    if "context" not in sizes:
        return ()
    for axes in context_choices(scheme):
        batch = size(scheme, [axis for axis in scheme.outer[0] if axis not in axes])
        if sizes["batch"] % batch == 0 and sizes["context"] % size(scheme, axes) == 0:
            return axes
    return scheme.context


def context_choices(scheme: Scheme) -> list[Axes]:
    """What may lie on the context: the scheme's wish, nothing, or all outer row axes that inner rows do not have."""
    free = tuple(axis for axis in scheme.outer[0] if axis not in scheme.inner[0])
    return list(dict.fromkeys([scheme.context, (), free]))


def size(scheme: Scheme, axes) -> int:
    """Number of parts that `axes` make together."""
    product = 1
    for axis in axes:
        product *= scheme.axes[axis]
    return product


def axes_of(*layouts: Layout) -> Axes:
    """All axes that occur in the layouts, each once."""
    return tuple(dict.fromkeys(axis for layout in layouts for dim in layout for axis in dim))


def check_words(words: tuple[str, ...]) -> None:
    """Raise ValueError, with the near miss, at the first word that is not the name of a dim."""
    for word in words:
        if word not in WORDS:
            raise ValueError(f"{' '.join(words)!r}: {word!r} is not the name of a dim; {near_miss(word, WORDS)}.")


def side(word: str) -> str:
    """`"outer"` for the residual stream, else `"inner"`: whole features lie where batches enter."""
    return "outer" if word == "embed" else "inner"


def features(placement: Placement, word: str) -> Axes:
    """The axes that split a feature dim."""
    if word in ("-", "layers", "replicas", *ROWS) or word in placement.whole:
        return ()
    return getattr(placement.scheme, side(word))[1]


def rows(placement: Placement, word: str, beside: str) -> Axes:
    """The axes that split the row dim `word` of an activation whose features are `beside`."""
    axes = getattr(placement.scheme, side(beside))[0]
    on_context = placement.on_context if side(beside) == "outer" else ()
    if word == "batch":
        return tuple(axis for axis in axes if axis not in on_context)
    return on_context if word == "context" else ()


def activation(placement: Placement, dims: str, rank: int) -> Layout:
    """Layout of an activation.

    Args:
        dims: a word per dim, or only the feature word, with rows named by rank (`ROWS_OF_RANK`).
        rank: number of dims of the array.
    """
    words = tuple(dims.split())
    if len(words) == 1 and rank > 1:
        words = (*ROWS_OF_RANK[rank], *words)
    check_words(words)
    if len(words) != rank:
        raise ValueError(f"{dims!r} names {len(words)} dims of an array that has {rank}; name each, or the last alone.")
    if placement.on_context and "embed" in words and "batch" in words and "context" not in words:
        raise ValueError(
            f"{dims!r}: the plan splits outer rows over {placement.on_context} on the context, "
            "which this array lacks; use a batch that all row axes divide."
        )
    beside = next((word for word in words if word in ("embed", *INNER)), "-")
    return tuple(rows(placement, w, beside) if w in ROWS else features(placement, w) for w in words)


def weight(placement: Placement, dims: str) -> Layout:
    """Layout of a parameter: its last two dims by the scheme's table, a vector by its side, the rest whole.

    A leading `layers` dim is the stack's, and lies over the pipeline.
    """
    words = tuple(dims.split())
    check_words(words)
    if words[:1] == ("layers",):
        over = (PIPE,) if placement.stack and PIPE in placement.scheme.axes else ()
        return (over, *weight(placement, " ".join(words[1:])))
    if len(words) < 2 or words[-2] in ("layers", "replicas", *ROWS):
        return tuple(features(placement, word) for word in words)
    return (*[()] * (len(words) - 2), *_matrix(placement, *words[-2:]))


def _matrix(placement: Placement, into: str, out: str) -> Layout:
    scheme = placement.scheme
    if "-" in (into, out):
        stem = scheme.enter if (into, out) == ("-", "embed") else None
        return stem or (features(placement, into), features(placement, out))
    table = scheme.table or scheme.up[::-1]
    if {into, out} == {"vocab", "embed"}:
        return table if into == "vocab" else table[::-1]
    if side(into) == side(out):
        return (scheme.across if into == "embed" else scheme.inside) or (features(placement, into), ())
    pair = scheme.up if into == "embed" else scheme.down
    return tuple(() if word in placement.whole else dim for word, dim in zip((into, out), pair, strict=True))


def replicas(placement: Placement) -> Axes:
    """Axes that split rows on both sides and hold copies of every weight: those that a reducer sums gradients over."""
    scheme = placement.scheme
    tables = [
        pair for pair in (scheme.up, scheme.down, scheme.table, scheme.across, scheme.inside, scheme.enter) if pair
    ]
    held = axes_of(*tables, (scheme.outer[1], scheme.inner[1]))
    return tuple(axis for axis in scheme.outer[0] if axis in scheme.inner[0] and axis not in held)
