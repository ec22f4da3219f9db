"""From a recipe to compiled functions: the state at birth, one update, one evaluation."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.core import compat
from jaxpar.core.types import LossScale, State
from jaxpar.plan import mesh as meshes
from jaxpar.plan import offload, padding
from jaxpar.plan.layout import Placement, rows
from jaxpar.plan.product import Settings
from jaxpar.step import master, scaling
from jaxpar.step.gradients import Found, evaluate, gradients
from jaxpar.step.partition import partition
from jaxpar.step.parts import Parts
from jaxpar.step.stream import Descent, descent
from jaxpar.step.update import updated


class Program(NamedTuple):
    """The functions of one run; nothing is compiled before the first call of each.

    Attributes:
        mesh: devices by axis.
        shapes: State of `jax.ShapeDtypeStruct`, padded, with shardings: what `step` takes and gives.
        unpadded: the same as a checkpoint holds it, without padding of the vocabulary and layers in order.
        placement: where parameters lie.
        words: the dims of each leaf: a State of strings, empty for a leaf that follows no parameter.
        init: `init() -> State`, each leaf made on the devices where it lives.
        batch: shapes and shardings of the (inputs, labels) that `step` takes, `[microbatches, examples, ...]`.
        place: `place((inputs, labels)) -> batch` on the devices, `[microbatches, examples, ...]`.
        step: jitted `step(state, batch) -> (state, metrics)`; the state is donated. If the loss or a gradient is no
            number, nothing but the count of steps changes, and `metrics["skipped"]` says so.
        evaluate: jitted `evaluate(params, extra, batch) -> (nats, labels, right)`, summed over the batch; right is how
            many labels have the largest logit, and 0 where an example has many labels.
        gradients: jitted `gradients(state, batch) -> Found`: the part that the layers are in, for tests and the bill.
    """

    mesh: Mesh
    shapes: State
    unpadded: State
    placement: Placement
    words: State
    init: Callable
    batch: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    place: Callable
    step: Callable
    evaluate: Callable
    gradients: Callable


def program(parts: Parts, devices: Sequence[jax.Device] | None = None) -> Program:
    """Lay the model out over the devices of its plan and put the step together.

    Args:
        parts: of the run.
        devices: as many as the plan takes; they may be only described, to lower and compile for. None: those here.

    Raises:
        Refused: for a budget of bytes (`plan.remat`) that no step keeps within.
    """
    if parts.settings.remat.kind == "budget":
        traced(parts)
    placement, model = parts.settings.placement, parts.model
    mesh = meshes.mesh_of(placement.scheme.axes, devices)
    settings, spread = partition(parts.partition, parts.settings, mesh)
    param_specs, moment_specs, extra_specs = _specs(parts)
    batch_specs = _batch_specs(placement, parts)

    plain = jax.eval_shape(partial(_born, parts), 0)
    specs = _state_places(parts, plain, (param_specs, moment_specs), extra_specs, PartitionSpec())
    shardings = _at_rest(parts.offload, meshes.shardings(mesh, specs), plain)
    shapes = jax.tree.map(_struct, plain, shardings)
    unpadded = jax.eval_shape(lambda seed: _state(parts, *model.init(jax.random.key(seed))), 0)
    words = _state_places(parts, shapes, (model.dims[0],) * 2, model.dims[1], "")
    found = _gradients(parts, settings, spread)
    stream = _stream(parts, mesh, words, specs._replace(params=moment_specs))

    measured = spread(
        partial(evaluate, model, parts.pipeline, settings),
        in_specs=(param_specs, extra_specs, batch_specs),
        out_specs=(PartitionSpec(),) * 3,
    )
    whole = NamedSharding(mesh, PartitionSpec())
    return Program(
        mesh=mesh,
        shapes=shapes,
        unpadded=unpadded,
        placement=placement,
        words=words,
        init=lambda: jax.jit(partial(_born, parts), out_shardings=shardings, compiler_options=_once(mesh))(
            np.uint32(parts.seed)
        ),
        batch=tuple(map(_struct, _batch_shapes(parts), meshes.shardings(mesh, batch_specs))),
        place=partial(_place, parts.microbatches, meshes.shardings(mesh, batch_specs)),
        step=jax.jit(
            _step(parts, found, meshes.shardings(mesh, moment_specs), stream),
            donate_argnums=0,
            out_shardings=(shardings, whole),
        ),
        evaluate=jax.jit(measured),
        gradients=jax.jit(partial(_found, parts.loss_scale, found)),
    )


def _step(parts: Parts, found: Callable, moments, stream: Descent | None) -> Callable:
    """`step(state, batch) -> (state, metrics)`, where `moments` are the shardings of what follows the parameters."""

    def resting(state):  # so that each device updates the part of which it holds the optimizer's state
        if "parameters" in parts.offload:  # they lie there already
            return state
        return state._replace(params=jax.lax.with_sharding_constraint(state.params, moments))

    def step(state, batch):
        scale = scaling.scale_of(parts.loss_scale, state.opt)
        new = found(state.params, state.extra, state.comm, batch, scale, state.step)
        state, metrics = updated(parts.optimizer, new, resting(state), parts.loss_scale, stream)
        return resting(state), metrics

    return step


def _found(loss_scale: LossScale | None, found: Callable, state: State, batch) -> Found:
    """The first half of a step alone, its gradients unscaled; a state without an optimizer has the first scale."""
    scale = scaling.scale_of(loss_scale, state.opt)
    new = Found(*found(state.params, state.extra, state.comm, batch, scale, state.step))
    return new._replace(gradients=scaling.unscaled(loss_scale, new.gradients, state.opt))


def traced(parts: Parts):
    """The jaxpr of loss and gradients, traced for the plan's mesh but without its devices."""
    mesh = compat.abstract_mesh(parts.settings.placement.scheme.axes or {"data": 1})
    found = _gradients(parts, parts.settings, partial(jax.shard_map, mesh=mesh))
    state = jax.eval_shape(partial(_born, parts), 0)
    if "parameters" in parts.offload:  # they are typed with the memory that they lie in
        places = offload.resting(meshes.shardings(mesh, _specs(parts)[0]), state.params)
        state = state._replace(params=jax.tree.map(_struct, state.params, places))
    scale = jax.eval_shape(partial(scaling.scale_of, parts.loss_scale), state.opt)
    closed = jax.make_jaxpr(found)(state.params, state.extra, state.comm, _batch_shapes(parts), scale, state.step)
    return compat.without_dead_code(closed.jaxpr)


def _gradients(parts: Parts, settings: Settings, spread: Callable) -> Callable:
    """`found(params, extra, comm, batch, scale, step)`, a `Found` as a tuple, on global arrays."""
    model, placement, whole = parts.model, parts.settings.placement, PartitionSpec()
    params, moments, extra = _specs(parts)
    comm = jax.tree.map(lambda _: whole, jax.eval_shape(partial(_born, parts), 0).comm)

    @partial(
        spread,
        in_specs=(params, extra, comm, _batch_specs(placement, parts), whole, whole),
        out_specs=(whole, moments, extra, comm),
    )
    def found(params, extra, comm, batch, scale, step):
        key = jax.random.fold_in(jax.random.key(np.uint32(parts.seed)), step)
        state = params, extra, comm
        return tuple(gradients(model, parts.pipeline, settings, parts.reducer, state, batch, key, scale))

    return found


def _specs(parts: Parts) -> tuple:
    """Where parameters lie between steps, where what follows them does (gradients, moments), and state of the model."""
    placement, zero = parts.settings.placement, parts.settings.zero
    params, moments = (meshes.specs(parts.model.dims[0], zero.layouts(stage)) for stage in (3, 1))
    return params, moments, meshes.parameter_specs(placement, parts.model.dims[1])


def _born(parts: Parts, seed) -> State:
    """The State that a run begins with, as it lies on devices."""
    made = zip(parts.model.dims, parts.model.init(jax.random.key(seed)), strict=True)
    return _state(parts, *(padding.pad(parts.settings.placement, dims, tree) for dims, tree in made))


def _once(mesh: Mesh) -> dict | None:
    """How to compile what runs once: random draws for each parameter take half the time to compile, with equal bits."""
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 1} if on_cpu and not chosen else None


def _struct(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _state(parts: Parts, params, extra) -> State:
    at_rest = master.resting(parts.master, params)
    return State(jnp.int32(0), at_rest, extra, parts.optimizer.init(params), parts.reducer.init(params))


def _stream(parts: Parts, mesh: Mesh, words: State, specs: State) -> Descent | None:
    """The optimizer where something that it reads rests on the host; arguments as of `descent`."""
    return descent(parts.links, mesh, words, specs) if parts.offload & {"parameters", "optimizer"} else None


def _at_rest(chosen: frozenset[str], shardings: State, shapes: State) -> State:
    """The shardings of a State of which what was chosen rests on the host."""
    if "parameters" in chosen:
        shardings = shardings._replace(params=offload.resting(shardings.params, shapes.params))
    if "optimizer" in chosen:
        shardings = shardings._replace(opt=offload.resting(shardings.opt, shapes.opt))
    return shardings


def _state_places(parts: Parts, shapes: State, own, extra, whole) -> State:
    """Of a whole State what is said of parameters and of moments, `own`, and of extra; `whole` for all other leaves."""
    params, moments = own
    opt = optimizer_places(parts.optimizer, shapes.opt, shapes.params, moments, whole)
    return State(whole, params, extra, opt, jax.tree.map(lambda _: whole, shapes.comm))


def optimizer_places(optimizer: optax.GradientTransformation, opt, params, places, whole):
    """Where an optimizer's state lies: what it keeps per parameter, in its shape, where that parameter does.

    Args:
        optimizer: whose state it is.
        opt, params: shapes of the state and of the parameters.
        places: of the parameters: a tree of specs, shardings or words.
        whole: the same for what lies in whole copies, such as counts, or the factors of a second moment.
    """

    def place(leaf, param, own):
        if _is_masked(leaf):
            return leaf
        return own if leaf.shape == param.shape else whole

    return optax.tree_map_params(
        optimizer, place, opt, params, places, transform_non_params=lambda _: whole, is_leaf=_is_masked
    )


def _is_masked(node) -> bool:
    """Whether `optax.masked` left this out: a node without leaves where the parameters have one."""
    return isinstance(node, optax.MaskedNode)


def _batch_specs(placement, parts: Parts):
    """Batches enter as inner rows, behind a dim of microbatches."""
    return tuple(PartitionSpec(None, rows(placement, "batch", "-") or None) for _ in (parts.inputs, parts.labels))


def _batch_shapes(parts: Parts) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What `_place` makes of a batch of the right shape; jax turns 64-bit numbers into 32-bit ones."""

    def one(a):
        shape = (parts.microbatches, a.shape[0] // parts.microbatches, *a.shape[1:])
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(a.dtype))

    return tuple(map(one, (parts.inputs, parts.labels)))


def _place(microbatches: int, shardings, batch):
    """Numpy (inputs, labels) of a whole batch, on the devices; a microbatch holds consecutive examples."""
    cut = [np.reshape(a, (microbatches, -1, *np.shape(a)[1:])) for a in batch]
    return tuple(jax.device_put(a, sharding) for a, sharding in zip(cut, shardings, strict=True))
