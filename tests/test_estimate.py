"""A compiled program's flops against theory, and its schedule against seconds, overlap and waiting known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from test_hlo import AXES, BYTES, CHAIN, EVERYONE, LOOPS, X, again, compiled, loop_of, loops_of, text_of

from jaxpar.report import estimate, hlo_flops
from jaxpar.report.estimate import Played, Rates, Reader
from jaxpar.report.hlo import How, count
from jaxpar.report.hlo_text import parse

RATES = Rates(clock=1000.0, memory=4096.0, link=lambda axes, kind: 2048.0, hop=0.0)


def nobody(scope, branches):
    return None


def played(text, axes=AXES, rates=RATES, shares=nobody, together=nobody, slices=1):
    program = parse(text)
    found = estimate.play(
        Reader(program, How(axes, shares, slices), rates, hlo_flops.inside(program), together), program.entry
    )
    parts = found.compute + found.kernels + found.exposed + found.fetching + found.idle
    assert found.seconds == pytest.approx(parts), "every second has a cause"
    assert found.sent == pytest.approx(sum(count(text, axes, shares, slices).sent.values()))
    return found


def flops_of(text, axes=AXES):
    found = played(text, axes, rates=None)
    assert found.unknown == ()
    return found.flops


def on_one(function, *inputs):
    return jax.jit(function).lower(*inputs).compile().as_text()


# From programs that jax compiles for the CPU.
W = jnp.ones((32, 48))
IMAGES, KERNEL = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 5))


def convolved(stride, padding, x=IMAGES, w=KERNEL, **settings):
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings
    )


@pytest.mark.parametrize(
    "function, inputs, flops",
    [
        (lambda x, w: x @ w, (X, W), 2 * 16 * 32 * 48),
        (lambda x, w: jnp.einsum("bik,bkj->bij", x, w), (jnp.ones((5, 4, 6)), jnp.ones((5, 6, 7))), 2 * 5 * 4 * 6 * 7),
        (
            lambda x, w: lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=7)[0],
            (X, W[:, :32]),
            7 * 2 * 16 * 32**2,
        ),
        (
            lambda x, w: lax.fori_loop(3, 11, lambda _, c: lax.fori_loop(0, 4, lambda _, c: jnp.sin(c @ w), c), x),
            (X, W[:, :32]),
            8 * 4 * 2 * 16 * 32**2,
        ),
        (
            lambda x, w: lax.cond(x[0, 0] > 0, lambda c: c @ w @ w, lambda c: c @ w, x),
            (X, W[:, :32]),
            2 * 2 * 16 * 32**2,
        ),
        (lambda x, w: convolved(1, "VALID", x, w), (IMAGES, KERNEL), 2 * 2 * 7 * 7 * 9 * 3 * 5),
        (lambda x, w: convolved(2, "VALID", x, w), (IMAGES, KERNEL), 2 * 2 * 4 * 4 * 9 * 3 * 5),
        # with a border of zeros, a kernel of 3 meets 9 + 2 x 8 entries of a row of 9
        (lambda x, w: convolved(1, "SAME", x, w), (IMAGES, KERNEL), 2 * 2 * 25**2 * 3 * 5),
        (lambda x, w: convolved(1, "VALID", x, w, rhs_dilation=(2, 2)), (IMAGES, KERNEL), 2 * 2 * 5 * 5 * 9 * 3 * 5),
        # 9 entries with a gap between any two are 17 long; 15 places, of which every second entry is no gap: 3 x 7.5
        (
            lambda x, w: convolved(1, ((0, 0), (0, 0)), x, w, lhs_dilation=(2, 2)),
            (IMAGES, KERNEL),
            2 * 2 * (8 + 7 + 8) ** 2 * 3 * 5,
        ),
    ],
)
def test_executed_flops_are_those_of_theory(function, inputs, flops):
    assert flops_of(on_one(function, *inputs), {"data": 1}) == flops


@pytest.mark.parametrize("stated", [True, False], ids=["trips_stated", "trips_derived"])
def test_flops_of_a_loop_count_every_trip(stated):
    text = compiled(lambda x: lax.psum(again(5, lambda c: jnp.sin(c @ c.T @ c), x), "b"), AXES, X)
    text = text if stated else text.replace("known_trip_count", "not_said")
    assert flops_of(text) == 5 * 2 * 2 * 16 * 16 * 32


def test_a_sharded_product_counts_one_device():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.NamedSharding(mesh, P("a", "b"))
    text = jax.jit(lambda x: x @ x, in_shardings=split, out_shardings=split).lower(W[:32, :32]).compile().as_text()
    assert flops_of(text) == 2 * 32**3 / 8


@pytest.mark.parametrize("name", LOOPS)
def test_what_is_played_is_what_is_counted(name):
    body, trips = LOOPS[name]
    found = played(compiled(lambda x: body(x, "b"), AXES, X))
    assert found.exposed == pytest.approx(trips * 1.5 * BYTES / 2048) and found.compute == 0


# From here on texts, for what only TPUs and GPUs print: 8 devices, x is f32[16,32], 2048 bytes: a second on any link.
def busy(name, cycles, operand="%x", calls="work"):
    config = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    return f"%{name} = f32[16,32]{{1,0}} fusion({operand}), kind=kLoop, calls=%{calls}, {config}"


WORK = """%work (y: f32[16,32]) -> f32[16,32] {
  %y = f32[16,32]{1,0} parameter(0)
  ROOT %z = f32[16,32]{1,0} negate(%y)
}
"""
DOT = """%multiply (y: f32[16,32]) -> f32[16,16] {
  %y = f32[16,32]{1,0} parameter(0)
  ROOT %z = f32[16,16]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""
PAIRS = "channel_id=1, source_target_pairs={{0,1},{1,2},{4,5},{5,6}}"
BACK = "channel_id=2, source_target_pairs={{1,0},{2,1},{5,4},{6,5}}"
START = "(f32[16,32]{1,0}, f32[16,32]{1,0}, u32[], u32[]) collective-permute-start(%x)"


def test_a_message_that_is_waited_for_is_exposed():
    text = text_of(busy("a", 500), f"%s = f32[16,32]{{1,0}} all-reduce(%a), {EVERYONE}, to_apply=%add", before=WORK)
    found = played(text)
    assert (found.compute, found.exposed, found.sending) == pytest.approx((0.5, 1.75, 1.75))
    assert found.started == 0 and found.beside == 0


@pytest.mark.parametrize("cycles, exposed", [(250, 0.75), (1000, 0.0), (3000, 0.0)])
def test_a_message_under_way_hides_behind_work(cycles, exposed):
    lines = f"%s = {START}, {PAIRS}", busy("a", cycles), "%d = f32[16,32]{1,0} collective-permute-done(%s)"
    found = played(text_of(*lines, before=WORK))
    assert (found.seconds, found.exposed) == pytest.approx((cycles / 1000 + exposed, exposed))
    assert found.started == found.beside == BYTES


def test_a_message_with_nothing_between_start_and_end_hides_nowhere():
    lines = busy("a", 700), f"%s = {START}, {PAIRS}", "%d = f32[16,32]{1,0} collective-permute-done(%s)"
    found = played(text_of(*lines, before=WORK))
    assert found.exposed == pytest.approx(1) and found.started == BYTES and found.beside == 0


@pytest.mark.parametrize("second, seconds", [(PAIRS, 2.0), (BACK, 1.0)], ids=["same way", "both ways"])
def test_messages_wait_for_their_link(second, seconds):
    lines = [f"%s = {START}, {PAIRS}", f"%t = {START}, {second}"]
    lines += [f"%d{name} = f32[16,32]{{1,0}} collective-permute-done(%{name})" for name in "st"]
    found = played(text_of(*lines))
    assert (found.seconds, found.sending) == pytest.approx((seconds, 2.0))


def test_a_tpu_chain_is_under_way_from_its_first_fusion_to_its_last():
    names = {"start": "%x", "middle": "%f.start", "end": "%got"}
    lines = [f"%f.{name} = f32[64,32]{{1,0}} fusion({of}), kind=kCustom, calls=%{name}" for name, of in names.items()]
    lines.insert(2, "%got = f32[64,32]{1,0} get-tuple-element(%f.middle), index=0")
    lines[1] += ', backend_config={"estimated_cycles":"2000"}'
    found = played(text_of(*lines, before="".join(CHAIN.values())))  # 3 x 2048 bytes: three seconds
    assert (found.compute, found.exposed, found.sending) == pytest.approx((2, 1, 3))
    assert found.started == found.beside == 3 * BYTES


def test_a_fusion_that_sends_is_waited_for():
    fused = f"""%all-reduce-scatter.1 (y: f32[16,32]) -> f32[2,32] {{
  %y = f32[16,32]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[16,32]{{1,0}} all-reduce(%y), {EVERYONE}, to_apply=%add
  ROOT %part = f32[2,32]{{1,0}} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={{2,32}}
}}
"""
    found = played(text_of("%f = f32[2,32] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1", before=fused))
    assert found.exposed == pytest.approx(7 / 8)


def test_more_dims_of_the_torus_carry_more():
    strategy = 'backend_config={"collective_algorithm_config":"UniDirectionNDRingStrategy active_dims:110"}'
    found = played(text_of(f"%s = f32[16,32]{{1,0}} all-reduce(%x), {EVERYONE}, to_apply=%add, {strategy}"))
    assert found.exposed == pytest.approx(1.75 / 2)


def test_each_hop_costs_time():
    found = played(text_of(f"%s = f32[16,32]{{1,0}} all-reduce(%x), {EVERYONE}"), rates=RATES._replace(hop=0.25))
    assert found.exposed == pytest.approx(1.75 + 7 * 0.25)


def test_without_cycles_flops_tell_what_lies_between():
    product = "%a = f32[16,16] fusion(%x), kind=kCustom, calls=%multiply"
    lines = f"%s = {START}, {PAIRS}", product, "%d = f32[16,32]{1,0} collective-permute-done(%s)"
    found = played(text_of(*lines, before=DOT), rates=None)
    assert found.flops == 2 * 16 * 16 * 32 and found.seconds == 0 and found.beside == BYTES


def test_a_loop_takes_as_long_as_its_trips():
    inside = '%s = f32[16,32]{1,0} fusion(%y), calls=%work, backend_config={"estimated_cycles":"100"}'
    assert played(loops_of(3, 11, WORK + loop_of("w", inside=inside))).compute == pytest.approx(0.8)


def test_a_loop_of_unknown_length_is_told():
    inside = '%s = f32[16,32]{1,0} fusion(%y), calls=%work, backend_config={"estimated_cycles":"100"}'
    found = played(loops_of(3, 11, WORK + loop_of("w", inside=inside, move="multiply(%i, %two)")))
    assert found.compute == pytest.approx(0.1) and len(found.unknown) == 1 and "one trip is played" in found.unknown[0]


SWITCH = """%long (y: f32[16,32]) -> f32[16,32] {
  %y = f32[16,32]{1,0} parameter(0)
  ROOT %l = f32[16,32]{1,0} fusion(%y), calls=%work, backend_config={"estimated_cycles":"4000"}
}
%short (y: f32[16,32]) -> f32[16,32] {
  %y = f32[16,32]{1,0} parameter(0)
  ROOT %s = f32[16,32]{1,0} fusion(%y), calls=%work, backend_config={"estimated_cycles":"1000"}
}
"""
CHOOSE = (
    "%p = s32[] constant(0)",
    "%c = f32[16,32]{1,0} conditional(%p, %x, %x), branch_computations={%long, %short}, "
    'metadata={op_name="timetable_F/cond"}',
)


def test_of_a_conditional_the_branch_that_takes_longest_is_played():
    assert played(text_of(*CHOOSE, before=WORK + SWITCH)).seconds == pytest.approx(4)


def test_a_device_of_a_pipeline_waits_for_the_longest_branch_of_each_tick():
    # four ticks: this device, the first, takes the long branch in one; another one in a second; nobody in the others
    ticks = np.array([[0, 1], [1, 0], [1, 1], [1, 1]])
    found = played(
        text_of(*CHOOSE, before=WORK + SWITCH),
        shares=lambda scope, branches: [0.25, 0.75],
        together=lambda scope, branches: ticks,
    )
    assert (found.compute, found.seconds, found.idle) == pytest.approx((1.75, 2.5, 0.75))


def test_a_kernel_takes_as_long_as_its_memory_traffic():
    found = played(text_of('%k = f32[16,32]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'))
    assert found.kernels == pytest.approx(1) and found.compute == 0


@pytest.mark.parametrize("cycles, waits", [(100, 0.4), (900, 0)])
def test_copies_from_memory_go_on_beside_work(cycles, waits):
    copy = "%p = (f32[16,32]{1,0:S(1)}, f32[16,32]{1,0}, u32[]) copy-start(%x)"
    found = played(text_of(copy, busy("a", cycles), "%d = f32[16,32]{1,0} copy-done(%p)", before=WORK))
    assert (found.fetching, found.exposed, found.sent) == pytest.approx((waits, 0, 0))


MEGASCALE = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r%s"'


@pytest.mark.parametrize(
    "type_, kind, seconds", [("ALL_REDUCE", "all_reduce", 1.5), ("ONE_TO_ONE", "permute", 1), ("NEW", None, 0)]
)
def test_slices_send_through_their_hosts(type_, kind, seconds):
    of = MEGASCALE % "1"
    lines = (
        "%t = token[] after-all()",
        f'%s = (f32[16,32], u32[], token[]) send(%x, %t), {of},_xla_megascale_transfer_type="{type_}"}}',
        f'%r = (f32[16,32], u32[], token[]) recv(%t), {of},_xla_megascale_transfer_type="{type_}"}}',
        "%e = token[] send-done(%s), is_host_transfer=true",
        busy("a", 500),
        "%d = (f32[16,32], token[]) recv-done(%r), is_host_transfer=true",
    )
    text = text_of(*lines, before=WORK)
    traffic, found = count(text, AXES, slices=4), played(text, slices=4)
    assert traffic.sent == ({("slices", kind): seconds * BYTES} if kind else {})
    assert bool(traffic.unknown) == (kind is None) == bool(found.unknown)
    assert found.exposed == pytest.approx(max(0, seconds - 0.5)) and found.beside == traffic.sent.get(
        ("slices", kind), 0
    )


def test_products_whose_size_is_unknown_are_told():
    found = played(text_of("%odd = f32[16,16] dot(%x, %lost), lhs_contracting_dims={1}, rhs_contracting_dims={0}"))
    assert found.flops == 2 * 16 * 16 * 32, "the left operand and the result say all"
    found = played(text_of("%odd = f32[16,16] dot(%lost, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"))
    assert found == Played(unknown=("dot odd: its size could not be read; not counted.",))


@pytest.mark.parametrize(
    "shapes, result, line, flops",
    [
        (
            ("f32[16,32]", "f32[32,48]"),
            "(f32[16,48], s8[1024])",
            'custom-call(%l, %r), custom_call_target="__cublas$lt$matmul", '
            'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_batch_dimensions":[]}}',
            2 * 16 * 32 * 48,
        ),
        # as a TPU writes products of matrices: without any window,
        (("f32[16,32]", "f32[32,48]"), "f32[16,48]", "convolution(%l, %r), dim_labels=bf_io->bf", 2 * 16 * 32 * 48),
        # several at once, with a window of 5 of which all but one entry fall into gaps,
        (
            ("f32[5,4,6]", "f32[5,7,6]"),
            "f32[5,4,7]",
            "convolution(%l, %r), window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0oi->0bf",
            5 * 2 * 4 * 6 * 7,
        ),
        # and with a window of 16 of which all but one entry fall into the border
        (
            ("f32[1,4,6]", "f32[16,6,7]"),
            "f32[16,4,7]",
            "convolution(%l, %r), window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            16 * 2 * 4 * 6 * 7,
        ),
        (
            ("f32[8,4,6]", "f32[8,4,7]"),
            "f32[1,6,7]",
            "convolution(%l, %r), window={size=8}, dim_labels=0fb_0io->0bf",
            8 * 2 * 4 * 6 * 7,
        ),
    ],
)
def test_products_that_libraries_and_tpus_write_otherwise(shapes, result, line, flops):
    left, right = (f"%{name} = {shape} constant(0)" for name, shape in zip("lr", shapes, strict=True))
    assert played(text_of(left, right, f"%product = {result} {line}")).flops == flops
