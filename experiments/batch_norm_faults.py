"""What is wrong with batch normalization?  Three of its faults, on digits, and what its rivals do about them.

1. *Biased gradients.* A network of three hidden layers that has learned a little is held still, and gradients of many
   batches of b examples are averaged. Without dependence between examples that mean is the gradient of the whole set,
   whatever b: so it is with group norm. Batch norm's is the gradient of another function for every b. Expect: its
   distance to the gradient of the whole set falls with b, roughly as 1 / b, as the error of a variance of b examples;
   online norm's, whose statistics span a thousand examples, is small and the same for all b; streaming norm lies
   between. (Chiley et al. 2019, arXiv:1905.05894, sections 2 and 3, call the gradient of batch norm biased.)
2. *Training is not evaluation.* The same network from scratch, with each norm and with batches of 32, 8 and 2 examples,
   the rate in proportion, so that all see as much; then the loss on held-out images, in batches as in training and by
   what evaluation does. Expect: the smaller the batch, the farther apart with batch norm; less with batch renorm; equal
   with group norm, for which training is evaluation.
3. *Skewed batches.* The same where each batch holds one class (in training, and where batches are as in training).
   Expect: a batch's statistics tell batch norm the class, so it learns that and fails in evaluation; renormalization
   mends part (Ioffe 2017, arXiv:1702.03275, section 4.3); norms of single examples lose nothing but what any loses by
   updates that each show one class.

Some three minutes on 2 idle cores.

    python -m experiments.batch_norm_faults
    python -m experiments.batch_norm_faults --examples 50000 --seeds 5 --name long
"""

import functools
import json
import os
import sys
import time
from dataclasses import dataclass

from experiments import batch_norm_report
from jaxpar.cli import exit_codes, flags
from jaxpar.core.refuse import Problem, refuse
from jaxpar.train.folder import of_study

PIXELS, WIDTH = 64, 64
NORMS = ("batch", "batch_renorm", "group", "online", "streaming")
STILL = "online:control=none"  # without control, the function of online norm is that of batch norm of the whole set
BIASED = {"batch": "batch", "online": STILL, "streaming": "streaming", "group": "group"}
BATCHES = (32, 8, 2)
MOST = 1_000_000
KNOWN = 1408  # training images of the first part, 2^7 * 11 of them
WARM = 2  # passes over them before gradients are averaged, so that statistics of streams have settled


@dataclass(frozen=True)
class Options:
    """What is trained and averaged.

    Attributes:
        name: the folder in --runs-dir.
        runs_dir: where folders of runs lie.
        overwrite: write over the table that is there.
        passes: over the training images, to average gradients.
        sizes: largest batch of the first part, whose sizes are the powers of 2 up to it.
        examples: that each run of the second and third part sees.
        learning_rate: of gradient descent with batches of 32; in proportion to the batch otherwise.
        seeds: runs of each, from other parameters and in other order.
    """

    name: str = "batch_norm_faults"
    runs_dir: str = "runs"
    overwrite: bool = False
    passes: int = 8
    sizes: int = 128
    examples: int = 16_000
    learning_rate: float = 0.2
    seeds: int = 3


def network(norm: str):
    """`(model, settings)` of a classifier of digits with three hidden layers, each with a norm, on one device."""
    import jax

    from jaxpar.core.parts import chain, function
    from jaxpar.layers.dense import dense
    from jaxpar.layers.embedding import head
    from jaxpar.layers.normalized import normalized
    from jaxpar.plan.layout import SINGLE
    from jaxpar.plan.product import Settings
    from jaxpar.plan.wire import device_wire
    from jaxpar.policies.fp32 import fp32

    def hidden(into, dims):
        return normalized(dense(into, WIDTH, dims, bias=False), norm, WIDTH, dims.split()[1], jax.nn.relu)

    sides = {"first": (PIXELS, "- embed"), "second": (WIDTH, "embed mlp"), "third": (WIDTH, "mlp embed")}
    parts = {"flatten": function(lambda x, ctx: x.reshape(x.shape[0], -1))}
    parts |= {name: hidden(*side) for name, side in sides.items()}
    return chain(parts | {"head": head(WIDTH, 10)}), Settings(SINGLE, fp32(), device_wire())


def one_step(model, settings):
    """`(params, extra, batch) -> (loss, gradients, extra)`, both halves of the state new."""
    import jax

    from jaxpar.step.objective import nats
    from jaxpar.step.pieces import halves, merged

    def step(params, extra, batch):
        forward, backward = halves(extra)

        def loss(params, backward):
            total, new = nats(model, settings, params, merged(forward, backward), batch)
            return total / len(batch[1]), halves(new)[0]

        (value, forward), (own, backward) = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, backward)
        return value, own, merged(forward, backward)

    return step


@functools.cache
def program(norm: str, rate: float):
    """`(start(key), train(start, order, data), judge(params, extra, order, data))` of the network, compiled once.

    Args:
        norm: as in `model.norm`.
        rate: of gradient descent.
    """
    import jax

    from jaxpar.plan.context import context

    model, settings = network(norm)
    step = one_step(model, settings)

    def train(start, order, data):
        def move(held, rows):
            params, extra = held
            _, own, extra = step(params, extra, (data[0][rows], data[1][rows]))
            return (jax.tree.map(lambda leaf, by: leaf - rate * by, params, own), extra), None

        return jax.lax.scan(move, start, order)[0]

    def judge(params, extra, order, data):
        def one(mode, rows):
            ctx = context(settings._replace(train=mode == "training"))
            logits, _ = model.apply(params, extra, data[0][rows], ctx)
            labels = data[1][rows]
            return {"loss": ctx.cross_entropy(logits, labels), "accuracy": logits.argmax(-1) == labels}

        found = jax.lax.map(lambda rows: {mode: one(mode, rows) for mode in ("training", "evaluation")}, order)
        return jax.tree.map(lambda leaf: leaf.mean(dtype="float32"), found)

    return jax.jit(model.init), jax.jit(train), jax.jit(judge)


def trained(norm: str, order, known, options: Options, seed: int):
    """Gradient descent on the batches whose examples `order[step, example]` names: `(params, extra)`."""
    import jax

    start, train, _ = program(norm, options.learning_rate * order.shape[1] / 32)
    return train(start(jax.random.key(seed)), order, known)


def shuffled(rng, count: int, size: int, batch: int, labels=None):
    """Batches of `batch` of `size` examples, `[count, batch]`, in random order; with labels each of one class."""
    import numpy as np

    def passes(rows, most):
        times = -(-most // len(rows))
        return np.concatenate([rng.permutation(rows) for _ in range(times)])[:most]

    if labels is None:
        return passes(np.arange(size), count * batch).reshape(count, batch)
    classes = passes(np.unique(labels), count)
    own = {c: passes(np.flatnonzero(labels == c), max(1, (classes == c).sum()) * batch) for c in np.unique(labels)}
    seen = dict.fromkeys(own, 0)
    rows = []
    for c in classes:
        rows.append(own[c][seen[c] : seen[c] + batch])
        seen[c] += batch
    return np.stack(rows)


def bias(options: Options, images, labels, tell) -> list[dict]:
    """The first part: distance of mean gradients of b examples to the gradient of all."""
    import jax
    import numpy as np
    from jax.flatten_util import ravel_pytree

    rng = np.random.default_rng(0)
    few = shuffled(rng, 60, KNOWN, 32)
    params = {norm: trained(norm, few, (images, labels), options, 0)[0] for norm in ("batch", "group")}
    whole = {norm: one_step(*network(norm)) for norm in params}
    rows = []
    for name, norm in BIASED.items():
        model, settings = network(norm)
        step, kind = one_step(model, settings), "group" if name == "group" else "batch"
        own, state = params[kind], model.init(jax.random.key(0))[1]
        start = network(kind)[0].init(jax.random.key(0))[1]
        _, right, _ = jax.jit(whole[kind])(own, start, (images[:KNOWN], labels[:KNOWN]))
        right = np.asarray(ravel_pytree(right)[0], np.float64)

        def average(extra, order, step=step, own=own):
            def add(held, rows):
                total, extra = held
                _, found, extra = step(own, extra, (images[rows], labels[rows]))
                return (jax.tree.map(lambda a, b: a + b, total, found), extra), None

            zeros = jax.tree.map(lambda leaf: 0 * leaf, own)
            (total, extra), _ = jax.lax.scan(add, (zeros, extra), order)
            return jax.tree.map(lambda leaf: leaf / len(order), total), extra

        average = jax.jit(average)
        batch = 2
        while batch <= options.sizes:
            extra, sums = state, 0
            for turn in range(WARM + options.passes):
                order = shuffled(rng, KNOWN // batch, KNOWN, batch)
                found, extra = average(extra, order)
                if turn >= WARM:
                    sums = sums + np.asarray(ravel_pytree(found)[0], np.float64) / options.passes
            distance = np.linalg.norm(sums - right) / np.linalg.norm(right)
            cosine = sums @ right / np.linalg.norm(sums) / np.linalg.norm(right)
            rows.append({"norm": name, "batch": batch, "distance": float(distance), "cosine": float(cosine)})
            tell(f"gradients: {name}, {batch}")
            batch *= 2
    return rows


def learned(options: Options, known, held_out, tell) -> list[dict]:
    """The second and third part: all norms, all sizes of batches, mixed and of one class each."""
    import jax
    import numpy as np

    rows = []
    for batch in BATCHES:
        for skewed in (False, True):
            for norm in NORMS:
                each = []
                for seed in range(options.seeds):
                    rng = np.random.default_rng(seed)
                    by = (np.asarray(known[1]), np.asarray(held_out[1])) if skewed else (None, None)
                    order = shuffled(rng, options.examples // batch, len(known[1]), batch, by[0])
                    spec = f"batch_renorm:begin={len(order) // 20}" if norm == "batch_renorm" else norm
                    params, extra = trained(spec, order, known, options, seed)
                    order = shuffled(rng, 1024 // batch, len(held_out[1]), batch, by[1])
                    judge = program(spec, options.learning_rate * batch / 32)[2]
                    each.append(jax.tree.map(float, judge(params, extra, order, held_out)))
                rows.append({"norm": norm, "batch": batch, "skewed": skewed, "runs": each})
                tell(f"{norm}, batches of {batch}{', one class each' if skewed else ''}")
    return rows


def wrong(options: Options) -> list[Problem]:
    """What cannot be."""
    least = {"passes": 1, "sizes": 2, "examples": 200, "seeds": 1}
    found = []
    for name, low in least.items():
        most = 128 if name == "sizes" else MOST
        if not low <= getattr(options, name) <= most:
            rule = f"must be from {low} to {most}."
            found.append(Problem(name, getattr(options, name), rule, str(getattr(Options, name))))
    if not 0 < options.learning_rate < MOST:
        rule = "must be a positive number."
        found.append(Problem("learning_rate", options.learning_rate, rule, str(Options.learning_rate)))
    return found


def digits() -> tuple:
    """`(images, labels)` of `KNOWN` training examples and of all that are held out, on the device."""
    import jax.numpy as jnp
    import numpy as np

    from jaxpar.core import family

    data = family.pick("datasets", "digits")(batch=KNOWN // 8)
    known = [data.batch(n) for n in range(8)]  # of one pass, so all different
    others = [data.held_out(n) for n in range(data.held_out_batches)]
    both = [[np.concatenate(arrays) for arrays in zip(*batches, strict=True)] for batches in (known, others)]
    return tuple(tuple(jnp.asarray(array[labels >= 0]) for array in (images, labels)) for images, labels in both)


def main(options: Options) -> None:
    """Show three faults of batch normalization on digits, and what other norms do about them."""
    from jaxpar.plan.mesh import devices

    refuse(wrong(options))
    folder = of_study(options.runs_dir, options.name, options.overwrite)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    devices(1)
    known, others = digits()
    work = len(BIASED) * (options.sizes.bit_length() - 1) + len(BATCHES) * len(NORMS) * 2
    done, began = [], time.perf_counter()

    def tell(what: str) -> None:
        done.append(what)
        left = (time.perf_counter() - began) / len(done) * (work - len(done))
        print(f"  {len(done)} of {work}, {what}, about {left:.0f} s left", file=sys.stderr, flush=True)

    found = {"bias": bias(options, *known, tell), "learned": learned(options, known, others, tell)}
    print(batch_norm_report.table(found))
    (folder / "table.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    path = batch_norm_report.picture(folder / "batch_norm_faults.png", found)
    print(f"\npicture: {path}\ntable: {folder / 'table.json'}")


if __name__ == "__main__":
    with exit_codes():
        main(flags(Options, None, f"{main.__doc__}\n\n{__doc__}", Options()))
