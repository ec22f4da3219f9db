"""The nouns of jaxpar: small records of plain values and pure functions, made once, then only read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Tree = Any  # a pytree of arrays


class Layer(NamedTuple):
    """A model or a part of one.

    Attributes:
        init: `init(key) -> (params, extra)`: trained leaves and state without gradient, both for the whole model.
        apply: `apply(params, extra, x, ctx) -> (y, extra)`: one device's part of the work; all it may know of other
            devices it asks of `ctx`.
        dims: mirrors what `init` returns, with one string of dim names per leaf, such as `"embed mlp"`: the whole
            sharding rule. Words: `batch context depth height width` (rows), `embed` (outer), `mlp heads kv_heads vocab
            channels` (inner), `layers`, `replicas` (of state, one for each part of a batch), and `-` (never split).
        parts: the links of a chain, in order, where there is one; pipelines, ZeRO and remat cut only here.
        blocks: of a stack of equal blocks, how many; its leaves have a leading `layers` dim, its one part is the block.
    """

    init: Callable[..., tuple[Tree, Tree]]
    apply: Callable[..., tuple[Any, Tree]]
    dims: tuple[Tree, Tree]
    parts: tuple["Part", ...] = ()
    blocks: int = 0


class Part(NamedTuple):
    """A link of a chain.

    Attributes:
        name: where the chain's params and extra hold what is the layer's own.
        layer: what it is.
        reads: where the chain's params hold what the layer reads: `name`, but for a tied head that of the token table.
    """

    name: str
    layer: Layer
    reads: str


class Context(NamedTuple):
    """The last argument of `Layer.apply`: all that a layer needs to know of devices, precision, randomness and mode.

    A dim word is split or not as the plan says; a layer never asks how. Activations have their rows first and their
    features last: `x[batch, embed]`, `x[batch, context, embed]`, `x[batch, height, width, embed]`.

    Attributes:
        dot: `dot(x, w, "embed mlp")`: x times w; with tuples of weights and dims, several products that share x.
        einsum: `einsum("bqhd,bkhd->bhqk", a, b)`: the product of two activations in the dtype they come in, none of
            whose dims that are summed is split; the result is float32.
        conv: `conv(x, w, "embed channels", strides=1, padding="SAME")`: as `dot`, for kernels
            `w[height, width, in, out]`, or with a depth in front, or tuples of these; zeros around x that keep size /
            strides (`"SAME"`), none (`"VALID"`), or so many on each side.
        mean: `mean(x, "embed", over="embed", parts=None, trained=True)`: mean over whole dims, kept as dims of size 1.
            With `parts={"embed": 8}` the dim is cut into so many equal runs of entries and keeps its size: each entry
            has the mean of its own run. No gradient goes through what is not `trained`.
        recurrence: `recurrence(decay, inputs, start, "batch embed") -> (before, last)`: the states
            s = decay s + inputs along the first dim, in the order of all examples of the microbatch: those before each
            entry, and the last. With `start[parts, width]` the examples are cut into so many equal runs, each with a
            state of its own. Without gradient.
        columns: `columns(a, "embed channels")`: sums over all dims but the last of an array that lies as a weight; they
            lie as a bias.
        concat: `concat([x, y], "embed")`: joined along the features, in the order that one device has them in.
        lookup: `lookup(table, ids)`: rows of `table["vocab embed"]`.
        cross_entropy: `cross_entropy(logits, labels)`: nats per row, 0 where the label is negative.
        correct: `correct(logits, labels)`: 1 where the largest logit, the first of equal ones, is that of the label.
        start: `start("heads", 4)`: global index of the first of 4 local entries of a dim; for a row dim
            `start("context", 8, beside="embed")`, since rows may lie differently beside outer and inner features.
        extent: `extent("batch", 4, beside="embed")`: entries over all devices of a dim that has 4 here.
        dropout: `dropout(x, rate, site, dims)`: the mask depends on (seed, step, layer, site, global index) alone.
        block: `block(apply)`: how a stack runs its body over leaves with a leading `layers` dim.
        hold: `hold(w, "mlp mlp")`: a weight fetched once, ahead of a loop that uses it many times.
        loop: `loop(body, carry, xs)`: `jax.lax.scan` for a loop over rows, counted by the bill.
        train: whether this is training (dropout on, batch statistics) or evaluation.
        scale: what gradients are multiplied by on their way back: the loss scale, or 1.
        fresh: whether this is the first microbatch since the weights changed; a boolean, maybe traced.
    """

    dot: Callable
    einsum: Callable
    conv: Callable
    mean: Callable
    recurrence: Callable
    columns: Callable
    concat: Callable
    lookup: Callable
    cross_entropy: Callable
    correct: Callable
    start: Callable
    extent: Callable
    dropout: Callable
    block: Callable
    hold: Callable
    loop: Callable
    train: bool
    scale: Any
    fresh: Any


class State(NamedTuple):
    """Everything that a checkpoint holds, and nothing else.

    Attributes:
        step: int32 scalar, updates done, those included that were skipped since they were no numbers.
        params: trained leaves, global arrays.
        extra: the model's state without gradient, such as running statistics.
        opt: the optimizer's state.
        comm: the reducer's state, such as what it has not sent yet.
    """

    step: Any
    params: Tree
    extra: Tree
    opt: Tree
    comm: Tree


class Dataset(NamedTuple):
    """Data as a pure function of the step, so that a checkpoint needs no iterator.

    Attributes:
        batch: `batch(step) -> (inputs, labels)`: the global training batch, numpy; a negative label is ignored.
        held_out: `held_out(i) -> (inputs, labels)` for `i < held_out_batches`: the same for the held-out split.
        held_out_batches: number of whole held-out batches.
        classes: number of distinct labels (for text: the vocabulary).
        example: shape of one input without the batch dim.
        splits: training and held-out split as whole arrays (uint8 tokens, or examples), for baselines.
        source: one line: what was read, from where.
    """

    batch: Callable[[int], tuple[np.ndarray, np.ndarray]]
    held_out: Callable[[int], tuple[np.ndarray, np.ndarray]]
    held_out_batches: int
    classes: int
    example: tuple[int, ...]
    splits: tuple[np.ndarray, np.ndarray]
    source: str


class Reducer(NamedTuple):
    """How the gradients that each device of the data axis found become the same everywhere.

    Attributes:
        init: `init(params) -> state`, kept in `State.comm`.
        reduce: `reduce(gradients, state, total) -> (gradients, state)`, with `total(gradients)` their sums over data,
            whole or, under ZeRO, the parts that this device owns.
    """

    init: Callable
    reduce: Callable


class LossScale(NamedTuple):
    """What the backward pass begins with in place of 1, so that small gradients survive in a format of few exponents.

    The loss itself is never multiplied; gradients come out scaled and are divided before anything else reads them.

    Attributes:
        init: `init() -> state`: single numbers, kept in `State.opt`; None where nothing is scaled.
        scale: `scale(state) -> float32`: what the step is scaled by that begins with this state.
        update: `update(state, fine) -> state`: after a step whose loss and gradients were finite, or were not.
    """

    init: Callable[[], Tree] | None
    scale: Callable[[Tree], Any]
    update: Callable[[Tree, Any], Tree]


class Sink(NamedTuple):
    """A further place for the metrics of a run; it may be slow or fail, and the run goes on (`train/sinks.py`).

    Attributes:
        write: `write(line)`: one line of metrics.jsonl: `step`, and numbers by name; names differ between lines.
        close: `close()`: the run is over, well or not.
    """

    write: Callable[[dict], None]
    close: Callable[[], None]
