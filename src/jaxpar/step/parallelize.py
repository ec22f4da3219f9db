"""Your own loss over many devices: a plain function of a tree of parameters, laid out by a plan."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.core import family, strict
from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.refuse import Collector, Problem, refuse
from jaxpar.core.scheme import Axes
from jaxpar.core.types import State, Tree
from jaxpar.plan import mesh as meshes
from jaxpar.plan.check import multiples
from jaxpar.step.program import optimizer_places

SCHEMES = ("single", "fsdp")  # all others lay out features, which only the dims of jaxpar's layers name
WHOLE_BELOW = 1024  # entries; to gather a smaller leaf takes longer than its memory is worth


class Parallel(NamedTuple):
    """A loss laid out over devices.

    Attributes:
        mesh: devices by axis: `data`, and `shard` for `tensor=fsdp:F`.
        shardings: where each leaf lies: a `State` of `jax.sharding.NamedSharding`.
        init: `init(params) -> State`: a copy of the parameters, and a new state of the optimizer. For parameters too
            large for one device, `init(make)` calls `make()` so that each leaf is made where it lives.
        shard: `shard(batch) -> batch` on the devices, ahead of use if you like: the leading dim of every array is split
            over all devices; scalars, and so random keys, are copied.
        value_and_grad: `value_and_grad(params, batch) -> (loss, gradients)`, the gradients laid out as the parameters.
        step: `step(state, batch) -> (state, loss)`: one update; the memory of the old state is reused for the new one.
    """

    mesh: Mesh
    shardings: State
    init: Callable[[Any], State]
    shard: Callable[[Tree], Tree]
    value_and_grad: Callable[[Tree, Tree], tuple[Any, Tree]]
    step: Callable[[State, Tree], tuple[State, Any]]


def parallelize(
    loss_fn: Callable[[Tree, Tree], Any],
    params: Tree,
    plan: str | Plan,
    optimizer: optax.GradientTransformation | None = None,
) -> Parallel:
    """Lay a loss of your own out over devices; the numbers are those of one device.

        import jax, jax.numpy as jnp, numpy as np, optax
        import jaxpar

        def loss_fn(params, batch):
            return jnp.mean((jnp.tanh(batch["x"] @ params["in"]) @ params["out"] - batch["y"]) ** 2)

        params = {"in": 0.1 * jax.random.normal(jax.random.key(0), (64, 256)), "out": jnp.zeros((256, 8))}
        batch = {"x": np.ones((32, 64), np.float32), "y": np.ones((32, 8), np.float32)}
        run = jaxpar.parallelize(loss_fn, params, "data=2,tensor=fsdp:4", optax.adamw(1e-2))
        state = run.init(params)
        for _ in range(10):
            state, loss = run.step(state, batch)

    With `fsdp:F` each leaf, its gradient and what the optimizer keeps for it rest in F parts, split along the largest
    dim that F divides; a leaf below 1024 entries, or with no such dim, is copied. Leaves are gathered as the loss
    begins, so that every device works on whole examples of its own. `microbatches=M` works on every M-th example at a
    time. The collectives are placed by XLA.

    Args:
        loss_fn: `loss_fn(params, batch)`: the mean loss over the examples of a batch, a scalar. A mean over anything
            else, such as the labels that are not masked, must come out alike for each microbatch.
        params: any tree of arrays, or of `jax.ShapeDtypeStruct`: only shapes and dtypes are looked at.
        plan: `data`, `tensor=fsdp:F`, `microbatches`; a Plan or its string.
        optimizer: any optax transformation; by default `optax.adamw(3e-4)`.

    Raises:
        Refused: naming every field of the plan that means nothing here; later, each array of a batch that does not
            divide.

    Source: Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, section 5.3, for `fsdp`.
    """
    optimizer = optimizer or optax.adamw(3e-4)
    refuse(_of_kinds(plan, optimizer))
    plan = Plan.parse(plan) if isinstance(plan, str) else plan
    refuse([*strict.mistyped(plan, "plan."), *_of_plan(plan), *_of_params(params)])
    axes = {name: size for name, size in {"data": plan.data, **scheme_of(plan.tensor).axes}.items() if size > 1}
    shapes = jax.eval_shape(lambda tree: tree, params)
    return _laid_out(loss_fn, shapes, axes, plan.microbatches, optimizer)


def _laid_out(loss_fn: Callable, shapes: Tree, axes: dict[str, int], microbatches: int, optimizer) -> Parallel:
    """All that `parallelize` returns, of what it has checked."""
    mesh = meshes.mesh_of(axes)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(tuple(axes) or None))
    places = jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf.shape, axes)), shapes)
    opt = optimizer_places(optimizer, jax.eval_shape(optimizer.init, shapes), shapes, places, whole)
    shardings = State(whole, places, {}, opt, {})
    gradients = _gradients(loss_fn, places, whole, microbatches)

    def born(params):
        own = jax.tree.map(jnp.copy, params)  # steps delete the state, and never what the caller holds
        return State(jnp.int32(0), own, {}, optimizer.init(own), {})

    def init(params):
        if callable(params) and jax.tree_util.all_leaves([params]):  # a tree may be callable, as modules are
            return jax.jit(lambda: born(params()), out_shardings=shardings)()
        return jax.jit(born, out_shardings=shardings)(jax.device_put(params, places))

    def shard(batch):
        refuse(_of_batch(batch, axes, microbatches))
        return jax.tree.map(lambda leaf: jax.device_put(leaf, rows if jnp.ndim(leaf) else whole), batch)

    def step(state, batch):
        loss, found = gradients(state.params, batch)
        updates, opt = optimizer.update(found, state.opt, state.params)
        return State(state.step + 1, optax.apply_updates(state.params, updates), {}, opt, {}), loss

    stepped = jax.jit(step, donate_argnums=0, out_shardings=(shardings, whole))
    found = jax.jit(gradients, out_shardings=(whole, places))
    return Parallel(
        mesh=mesh,
        shardings=shardings,
        init=init,
        shard=shard,
        value_and_grad=lambda params, batch: found(jax.device_put(params, places), shard(batch)),
        step=lambda state, batch: stepped(state, shard(batch)),
    )


def _gradients(loss_fn: Callable, places: Tree, whole: NamedSharding, microbatches: int) -> Callable:
    """`gradients(params, batch) -> (loss, gradients)` on global arrays, of the mean over all examples."""
    hold = jax.lax.with_sharding_constraint

    def loss(params, batch):
        # held twice: so each gradient goes from where it was summed straight to where its leaf lies
        gathered = jax.tree.map(lambda leaf, place: hold(hold(leaf, place), whole), params, places)
        value = loss_fn(gathered, batch)
        if jnp.shape(value) != ():
            raise ValueError(
                f"loss_fn returned {jax.tree.map(jnp.shape, value)} for a batch; it must return one number, "
                "the mean over the examples: end it in jnp.mean(...)."
            )
        return value

    def one(params, batch, index):
        part = jax.tree.map(lambda leaf: _part(leaf, index, microbatches), batch)
        return jax.value_and_grad(loss)(params, part)

    def gradients(params, batch):
        if microbatches == 1:
            return jax.value_and_grad(loss)(params, batch)

        def work(total, index):
            return jax.tree.map(jnp.add, total, one(params, batch, index)), None

        shapes = jax.eval_shape(one, params, batch, 0)
        value, found = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = jax.lax.scan(work, (value, hold(found, places)), jnp.arange(microbatches))
        return jax.tree.map(lambda leaf: leaf / microbatches, total)

    return gradients


def _part(leaf, index, microbatches: int):
    """Every M-th example, from `index` on: each device has as many of them as any other, and nothing moves."""
    if not jnp.ndim(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, index) if is_key else leaf
    return leaf.reshape(leaf.shape[0] // microbatches, microbatches, *leaf.shape[1:])[:, index]


def _spec(shape: tuple[int, ...], axes: dict[str, int]) -> PartitionSpec:
    """Split along the largest dim that divides, the last of several; small leaves whole."""
    parts = axes.get("shard", 1)
    divided = [dim for dim, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not divided or np.prod(shape) < WHOLE_BELOW:
        return PartitionSpec()
    chosen: Axes = (None,) * max(divided, key=lambda dim: (shape[dim], dim))
    return PartitionSpec(*chosen, "shard")


def _of_plan(plan: Plan):
    """Every field that means nothing for a function whose layers have no names."""
    taken = {"data", "tensor", "microbatches", "partition"}
    for field in dataclasses.fields(plan):
        value, name = getattr(plan, field.name), f"plan.{field.name}"
        if field.name not in taken and value != field.default:
            legal = f"{field.name}={str(field.default).lower()}"
            instead = "; tensor=fsdp:F splits parameters, gradients and optimizer state" * field.name.startswith("zero")
            yield Problem(name, value, "means nothing for a loss of your own.", legal + instead)
        elif isinstance(value, int) and not isinstance(value, bool) and value < 1 and field.name in taken:
            yield Problem(name, value, "must be at least 1.", "1")
    if plan.partition not in ("manual", "auto"):
        yield Problem("plan.partition", plan.partition, "is not a choice.", "auto")
    found = Collector([])
    scheme, known = found.attempt(scheme_of, plan.tensor), family.names("schemes")
    yield from found.problems
    if scheme and plan.tensor.partition(":")[0] not in SCHEMES:
        rule = f"splits features, which only layers of jaxpar name ({', '.join(set(known) - {*SCHEMES})})."
        yield Problem("plan.tensor", plan.tensor, rule, f"single, or fsdp:{int(np.prod([*scheme.axes.values()]))}")


def _of_kinds(plan, optimizer):
    if not isinstance(plan, str | Plan):
        yield Problem("plan", repr(plan), "must be a Plan or its text.", '"data=2,tensor=fsdp:4"')
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        yield Problem("optimizer", repr(optimizer), "must be an optax transformation.", "optax.adamw(3e-4)")


def _of_params(params: Tree):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        yield Problem("params", params, "has no arrays.", 'a tree of arrays, such as net.init(key, x)["params"]')
    for path, leaf in leaves:
        name, dtype = f"params{jax.tree_util.keystr(path)}", getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            rule = f"must be an array of numbers with a gradient, got {dtype or type(leaf).__name__}."
            yield Problem(name, getattr(leaf, "shape", leaf), rule, "float32; close loss_fn over what is not trained")


def _of_batch(batch: Tree, axes: dict[str, int], microbatches: int):
    """Each array whose examples do not divide."""
    parts = int(np.prod([*axes.values()])) * microbatches
    into = " x ".join(f"{name} = {size}" for name, size in {**axes, "microbatches": microbatches}.items() if size > 1)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(leaf) and leaf.shape[0] % parts:
            name = f"batch{jax.tree_util.keystr(path)}"
            rule = f"must hold a multiple of {parts} examples ({into})."
            yield Problem(name, leaf.shape[0], rule, multiples(leaf.shape[0], parts))
