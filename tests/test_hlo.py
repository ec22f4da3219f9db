"""The counter of compiled traffic, against bytes known from theory: to the byte, and never a silent zero."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxpar.report.hlo import count

MESHES = {"8": {"a": 8}, "2x4": {"a": 2, "b": 4}, "2x2x2": {"a": 2, "b": 2, "c": 2}}
X = jnp.ones((16, 32))
BYTES = X.nbytes


def compiled(body, axes, *inputs):
    """Text of `body`, which each device runs on the whole of `inputs`."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(jax.sharding.AxisType.Auto,) * len(axes))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(*inputs).compile().as_text()


def ring(x, axis):
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(place, (place + 1) % n) for place in range(n)])


def moved_sum(x, axis):
    return jnp.sin(lax.psum(x, axis))  # the sine keeps the compiler from taking the sum out of a loop


def again(times, step, x):
    return lax.scan(lambda carry, _: (step(carry), None), x, None, length=times)[0]


def countdown(x, axis):
    return lax.while_loop(lambda c: c[0] > 2, lambda c: (c[0] - 3, moved_sum(c[1], axis)), (20, x))[1]


def either(x, axis):
    return lax.cond(x[0, 0] > 0, lambda x: moved_sum(x[:8], axis).repeat(2, 0), lambda x: moved_sum(x, axis), x)


def from_outer_counter(x, axis):
    inner = lambda i, x: lax.fori_loop(i, i + 4, lambda _, x: moved_sum(x, axis), x)  # noqa: E731
    return lax.fori_loop(0, 5, inner, x)


def sums(n, b):
    return 2 * (n - 1) * b / n


# name: (body, kind, bytes that one of n devices sends for an operand of b bytes, operations that run)
STRAIGHT = {
    "all_gather": (lambda x, axis: lax.all_gather(x, axis, tiled=True), "all_gather", lambda n, b: (n - 1) * b, 1),
    "psum": (lax.psum, "all_reduce", sums, 1),
    "psum_scatter": (
        lambda x, axis: lax.psum_scatter(x, axis, tiled=True),
        "reduce_scatter",
        lambda n, b: (n - 1) * b / n,
        1,
    ),
    "all_to_all": (
        lambda x, axis: lax.all_to_all(x, axis, 0, 1, tiled=True),
        "all_to_all",
        lambda n, b: (n - 1) * b / n,
        1,
    ),
    "ppermute": (ring, "permute", lambda n, b: b, 1),
    "ppermute_of_one_pair": (lambda x, axis: lax.ppermute(x, axis, [(0, 1)]), "permute", lambda n, b: b, 1),
    "cond": (either, "all_reduce", sums, 1),
}
LOOPS = {
    "scan_7": (lambda x, axis: again(7, lambda x: moved_sum(x, axis), x), 7),
    "scan_5_of_scan_7": (lambda x, axis: again(5, lambda x: again(7, lambda x: moved_sum(x, axis), jnp.cos(x)), x), 35),
    "fori_3_to_11": (lambda x, axis: lax.fori_loop(3, 11, lambda _, x: moved_sum(x, axis), x), 8),
    "countdown_by_3": (countdown, 6),
    "from_outer_counter": (from_outer_counter, 20),
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", STRAIGHT)
def test_operation_sends_what_theory_says(name, mesh):
    body, kind, theory, operations = STRAIGHT[name]
    axes = MESHES[mesh]
    axis, n = list(axes.items())[-1]
    traffic = count(compiled(lambda x: body(x, axis), axes, X), axes)
    assert traffic == ({(axis, kind): theory(n, BYTES)}, {(axis, kind): operations}, ())


@pytest.mark.parametrize("stated", [True, False], ids=["trips_stated", "trips_derived"])
@pytest.mark.parametrize("name", LOOPS)
def test_loop_counts_every_trip(name, stated):
    body, trips = LOOPS[name]
    text = compiled(lambda x: body(x, "b"), MESHES["2x4"], X)
    if not stated:  # as a TPU prints it
        text = text.replace("known_trip_count", "not_said")
    key = ("b", "all_reduce")
    assert count(text, MESHES["2x4"]) == ({key: trips * sums(4, BYTES)}, {key: trips}, ())


@pytest.mark.parametrize(
    "mesh, over, n",
    [
        ("2x4", "ab", 8),
        ("2x2x2", "ab", 4),
        ("2x2x2", "ac", 4),
        ("2x2x2", "bc", 4),
        ("2x2x2", "ca", 4),
        ("2x2x2", "abc", 8),
    ],
)
def test_axes_are_named_in_mesh_order(mesh, over, n):
    text = compiled(lambda x: lax.psum(x, tuple(over)), MESHES[mesh], X)
    assert count(text, MESHES[mesh]).sent == {("+".join(sorted(over)), "all_reduce"): sums(n, BYTES)}


def test_combined_sum_of_several_dtypes():
    text = compiled(lambda x: lax.psum((x, x[:8], x.astype(jnp.int32), x.astype(jnp.int8)), "b"), MESHES["2x4"], X)
    assert re.search(r"= \(f32\S+, f32\S+\) all-reduce\(", text)
    assert count(text, MESHES["2x4"]).sent == {("b", "all_reduce"): sums(4, BYTES + BYTES // 2 + BYTES + BYTES // 4)}


@pytest.mark.parametrize("name", ["all_gather", "psum", "psum_scatter", "ppermute"])
def test_bfloat16_counts_as_the_float32_that_cpu_sends(name):
    # XLA for CPU has no collectives on bfloat16: it converts, sends twice the bytes, and converts back
    body, kind, theory, _ = STRAIGHT[name]
    text = compiled(lambda x: body(x, "a"), MESHES["8"], X.astype(jnp.bfloat16))
    assert count(text, MESHES["8"]).sent == {("a", kind): theory(8, BYTES)}


def test_axes_of_size_one_send_nothing():
    axes = {"one": 1, "a": 8}
    assert count(compiled(lambda x: lax.psum(x, "one"), axes, X), axes) == ({}, {}, ())
    assert set(count(compiled(lambda x: lax.psum(x, ("one", "a")), axes, X), axes).sent) == {("a", "all_reduce")}


def test_gspmd_groups_are_read():
    # only programs that XLA partitions itself print iota and mesh groups
    axes = MESHES["2x4"]
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs, outputs = (jax.NamedSharding(mesh, spec) for spec in (P("a", "b"), P("b")))
    text = (
        jax.jit(lambda x: x @ x.T, in_shardings=inputs, out_shardings=outputs)
        .lower(jnp.ones((64, 32)))
        .compile()
        .as_text()
    )
    traffic = count(text, axes)
    assert "replica_groups=mesh[" in text and "replica_groups=[" in text
    # x is gathered along a, to 64 x 8; its product summed along b; a quarter of that, of 16 x 32, gathered along a
    assert traffic.sent == {("a", "all_gather"): (32 * 8 + 16 * 32) * 4, ("b", "all_reduce"): sums(4, 64 * 32 * 4)}
    assert traffic.unknown == ()


def test_unknown_trips_count_as_one_and_say_so():
    def body(x, n):
        return lax.fori_loop(0, n, lambda _, x: moved_sum(x, "a"), x)

    sent, messages, unknown = count(compiled(body, MESHES["8"], X, 3), MESHES["8"])
    assert sent == {("a", "all_reduce"): sums(8, BYTES)} and messages == {("a", "all_reduce"): 1}
    assert len(unknown) == 1 and re.match(
        rf"while while\S*: how often .* one trip, {sums(8, BYTES):.0f} bytes", unknown[0]
    )


def test_loop_without_traffic_needs_no_trips():
    text = compiled(lambda x, n: lax.psum(lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x), "a"), MESHES["8"], X, 3)
    assert count(text, MESHES["8"]).unknown == ()


# From here on texts, for what no CPU program prints: 8 devices, x is f32[16,32].
AXES = MESHES["2x4"]
ADD = """%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %sum = f32[] add(%p, %q)
}
"""


def text_of(*lines, before="", header="num_partitions=8"):
    body = "\n".join(f"  {line}" for line in ("%x = f32[16,32]{1,0} parameter(0)", *lines))
    return f"HloModule test, {header}\n\n{ADD}\n{before}\nENTRY %main (x: f32[16,32]) -> f32[] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    "groups, label",
    [
        ("{{0,1,2,3},{4,5,6,7}}", "b"),
        ("{{4,0},{5,1},{2,6},{3,7}}", "a"),
        ("{}", "a+b"),
        ("[2,4]<=[8]", "b"),
        ("[1,8]<=[8]", "a+b"),
        ("[4,2]<=[2,4]T(1,0)", "a"),
        ("[4,2]<=[2,2,2]T(2,1,0)", "a"),
        ("mesh['x'=2,'y'=4] {'y'}", "b"),
        ("mesh['x'=2,'y'=4] {'x'}", "a"),
        ("mesh['x'=2,'y'=4] {'y','x'}", "a+b"),
        ("mesh['x'=8] {'x':(1)2}", "a"),
        ("mesh['x'=8] {'x':(2)4}", "b"),
        ("mesh['x'=8] {'x':(2)2,'x':(4)2}", "b"),
        ("mesh['x'=1,'y'=4,'z'=2], device_ids=([2,4]T(1,0)) {'y'}", "b"),
        ("mesh['x'=4,'y'=2], device_ids=(0,4,1,5,2,6,3,7) {'y'}", "a"),
        ("@mesh[x=2,y=4] {y}", "b"),
    ],
)
def test_groups_are_read_in_every_way_to_write_them(groups, label):
    line = f"%g = f32[16,32]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true"
    n = {"a": 2, "b": 4, "a+b": 8}[label]
    assert count(text_of(line), AXES) == ({(label, "all_reduce"): sums(n, BYTES)}, {(label, "all_reduce"): 1}, ())


@pytest.mark.parametrize(
    "line, label",
    [
        ("all-reduce(%x), replica_groups={{0,1}}", "a"),
        ("all-reduce(%x), channel_id=1, replica_groups={{0,1}}", "a+b"),
        ("all-reduce(%x), channel_id=1, replica_groups={{0},{1}}", "b"),
        ("all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global_device_ids=true", "a"),
        ("all-to-all(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}", "b"),
        ("collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}", "b"),
        ("collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "a"),
    ],
)
def test_numbers_of_replicas_and_partitions_become_devices(line, label):
    text = text_of(f"%g = f32[16,32]{{1,0}} {line}", header="replica_count=2, num_partitions=4")
    sent, _, unknown = count(text, AXES)
    assert [key[0] for key in sent] == [label] and unknown == ()


EVERYONE = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"
WRAPPED = f"""%wrapped (y: f32[16,32]) -> f32[2,32] {{
  %y = f32[16,32]{{1,0}} parameter(0)
  ROOT %scattered = f32[2,32]{{1,0}} reduce-scatter(%y), {EVERYONE}, dimensions={{0}}, to_apply=%add
}}, execution_thread="other"
"""


@pytest.mark.parametrize(
    "op, operands, shape, kind, sent",
    [
        ("all-gather", "%x", "(f32[16,32]{1,0}, f32[128,32]{1,0})", "all_gather", 7 * BYTES),
        ("all-reduce", "%x", "f32[16,32]{1,0}", "all_reduce", sums(8, BYTES)),
        (
            "reduce-scatter",
            "%x, %x",
            "((f32[16,32], f32[16,32]), (f32[2,32], f32[2,32]))",
            "reduce_scatter",
            14 / 8 * BYTES,
        ),
        ("all-to-all", "%x", "((f32[16,32]{1,0}), f32[16,32]{1,0})", "all_to_all", 7 / 8 * BYTES),
        ("collective-broadcast", "%x", "((f32[16,32]{1,0}), f32[16,32]{1,0}, u32[])", "broadcast", BYTES),
        ("async", "%x", "((f32[16,32]{1,0}), f32[2,32]{1,0}, u32[])", "reduce_scatter", 7 / 8 * BYTES),
    ],
)
def test_asynchronous_operation_counts_once(op, operands, shape, kind, sent):
    how = "calls=%wrapped" if op == "async" else EVERYONE
    lines = (f"%s = {shape} {op}-start({operands})", f"%u = {shape} {op}-update(%s)", f"%d = f32[2,32] {op}-done(%u)")
    text = text_of(*(f"{line}, {how}" for line in lines), before=WRAPPED if op == "async" else "")
    assert count(text, AXES) == ({("a+b", kind): sent}, {("a+b", kind): 1}, ())


@pytest.mark.parametrize(
    "pairs, label, sends",
    [
        ("{{0,1},{1,2},{4,5},{5,6}}", "b", 1),
        ("{{0,4},{4,0}}", "a", 1),
        ("{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}", "a+b", 1),
        ("{{0,1},{0,2},{0,3},{1,0}}", "b", 3),
        ("{{0,0},{1,1}}", "", 0),
        ("{}", "", 0),
    ],
)
def test_permute_counts_what_its_busiest_device_sends(pairs, label, sends):
    shape = "(f32[16,32]{1,0}, f32[16,32]{1,0}, u32[], u32[])"
    line = f"%s = {shape} collective-permute-start(%x), channel_id=1, source_target_pairs={pairs}"
    sent = {(label, "permute"): sends * BYTES} if sends else {}
    assert count(text_of(line, "%d = f32[16,32]{1,0} collective-permute-done(%s)"), AXES)[::2] == (sent, ())


@pytest.mark.parametrize(
    "shape, size",
    [
        ("s4[16,33]{1,0:T(64,128)(8,1)E(4)S(1)}", 264),
        ("s4[16,33]{1,0}", 528),  # a byte each, unless packed
        ("s2[16,33]{1,0:E(2)}", 132),
        ("u1[9]{0:E(1)}", 2),
        ("pred[16,33]{1,0}", 528),
        ("f8e4m3fn[16,33]{1,0}", 528),
        ("bf16[16,33]{1,0:T(8,128)(2,1)}", 1056),
        ("c128[3]{0}", 48),
        ("f64[]", 8),
        ("f32[<=16,33]{1,0}", 2112),
        ("(f32[2]{0}, /*index=1*/bf16[3]{0}, token[])", 14),
    ],
)
def test_bytes_of_a_dtype(shape, size):
    gather = f"%g = {shape} all-gather(%y), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true"
    assert count(text_of(f"%y = {shape} constant(0)", gather), AXES).sent == {("a", "all_gather"): size}


PIECE = """%y = f32[16,32]{1,0} parameter(0)
  %piece = f32[64,32]{1,0} all-gather(%y), channel_id=3, replica_groups=[2,4]<=[8], use_global_device_ids=true,\
 backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}"""
CHAIN = {
    name: f"%{name} (y: f32[16,32]) -> f32[64,32] {{\n  {PIECE}\n  {root}\n}}\n"
    for name, root in {
        "start": 'ROOT %s = (f32[64,32]{1,0}, u32[]) custom-call(%piece), custom_call_target="AsyncCollectiveStart"',
        "middle": "ROOT %t = (f32[64,32]{1,0}, u32[]) tuple(%piece)",
        "end": 'ROOT %e = f32[64,32]{1,0} custom-call(%y, %piece), custom_call_target="AsyncCollectiveDone"',
    }.items()
}


def test_tpu_chain_counts_once():
    lines = (f"%f.{name} = f32[64,32]{{1,0}} fusion(%x), kind=kCustom, calls=%{name}" for name in CHAIN)
    key = ("b", "all_gather")
    assert count(text_of(*lines, before="".join(CHAIN.values())), AXES) == ({key: 3 * BYTES}, {key: 1}, ())


def test_tpu_sum_that_keeps_its_own_part_is_a_reduce_scatter():
    fused = f"""%all-reduce-scatter.clone.1 (y: f32[16,32]) -> f32[2,32] {{
  %y = f32[16,32]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %all = f32[16,32]{{1,0}} all-reduce(%y), {EVERYONE}, to_apply=%add
  ROOT %part = f32[2,32]{{1,0}} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={{2,32}}
}}
"""
    text = text_of("%f = f32[2,32] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone.1", before=fused)
    assert count(text, AXES).sent == {("a+b", "reduce_scatter"): 7 / 8 * BYTES}


def test_conversion_fused_into_a_sum_sends_the_narrower():
    assert count(text_of(f"%s = bf16[16,32]{{1,0}} all-reduce(%x), {EVERYONE}"), AXES).sent == {
        ("a+b", "all_reduce"): sums(8, BYTES / 2)
    }


def test_attributes_may_span_lines_that_begin_with_braces():
    kernel = (
        '%k = f32[16,32]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={kernel={\n"a":"1"\n}}'
    )
    traffic = count(text_of(kernel, f"%s = f32[16,32]{{1,0}} all-reduce(%k), {EVERYONE}"), AXES)
    assert traffic.sent == {("a+b", "all_reduce"): sums(8, BYTES)} and traffic.unknown == ()


STATE = "(s32[], f32[16,32]{1,0}, s32[])"  # counter, x, limit
SUM = f"%s = f32[16,32]{{1,0}} all-reduce(%y), {EVERYONE}"


def loop_of(name, test="compare(%i, %n), direction=LT", move="add(%i, %one)", limit="copy(%n)", inside=SUM, check=""):
    """Check and body of a loop: go on while `test`, the counter set to `move` and the limit to `limit` in each trip."""
    begin = f"""  %t = {STATE} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %y = f32[16,32]{{1,0}} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %one = s32[] constant(1)
  %two = s32[] constant(2)"""
    return f"""%{name}.check (t: {STATE}) -> pred[] {{
{begin}
  %early = s32[] add(%two, %i)
  {check}
  ROOT %go = pred[] {test}
}}
%{name}.body (t: {STATE}) -> {STATE} {{
{begin}
  {inside}
  %move = s32[] {move}
  %limit = s32[] {limit}
  ROOT %r = {STATE} tuple(%move, %s, %limit)
}}
"""


def loops_of(first, limit, before, names="w"):
    """A program that runs the loops `names` one after the other, all with the limit that the loop before it left."""
    lines = [f"%first = s32[] constant({first})", f"%limit = s32[] constant({limit})"]
    for name in names:
        lines += [f"%t.{name} = {STATE} tuple(%first, %x, %limit{'.' + names[0] if name != names[0] else ''})"]
        lines += [f"%{name} = {STATE} while(%t.{name}), condition=%{name}.check, body=%{name}.body"]
        lines += [f"%limit.{name} = s32[] get-tuple-element(%{name}), index=2"]
    return text_of(*lines, before=before)


@pytest.mark.parametrize(
    "first, limit, trips, loop",
    [
        (3, 11, 8, {}),
        (11, 3, 0, {}),
        (3, 11, 9, {"test": "compare(%i, %n), direction=LE"}),
        (3, 11, 8, {"test": "compare(%n, %i), direction=GT"}),
        (3, 11, 6, {"test": "compare(%early, %n), direction=LT"}),
        (3, 12, 5, {"move": "add(%two, %i)"}),
        (11, 3, 4, {"test": "compare(%i, %n), direction=GT", "move": "subtract(%i, %two)"}),
        (11, 3, 5, {"test": "compare(%i, %n), direction=GE", "move": "subtract(%i, %two)"}),
        (3, 11, 4, {"test": "compare(%i, %n), direction=NE", "move": "add(%i, %two)"}),
        (0, 10, 5, {"limit": "subtract(%n, %one)"}),
        (3, 11, None, {"move": "subtract(%i, %one)"}),
        (3, 10, None, {"test": "compare(%i, %n), direction=NE", "move": "add(%i, %two)"}),
        (3, 3, None, {"test": "compare(%i, %n), direction=EQ"}),
        (3, 11, None, {"move": "multiply(%i, %two)"}),
        (3, 11, None, {"limit": "subtract(%i, %n)"}),
        (3, 11, None, {"test": "and(%one, %two)"}),
    ],
)
def test_trips_are_derived_from_counters(first, limit, trips, loop):
    _, messages, unknown = count(loops_of(first, limit, loop_of("w", **loop)), AXES)
    assert messages.get(("a+b", "all_reduce"), 0) == (1 if trips is None else trips)
    assert len(unknown) == (trips is None)


@pytest.mark.parametrize("stated", ['"known_trip_count":{"n":"6"}', "known_trip_count={n=6}"])
def test_stated_trips_need_no_counter(stated):
    text = loops_of(3, 11, loop_of("w", move="multiply(%i, %two)"))
    traffic = count(text.replace("body=%w.body", f"body=%w.body, backend_config={{{stated}}}"), AXES)
    assert traffic.messages == {("a+b", "all_reduce"): 6} and traffic.unknown == ()


def test_limits_reach_loops_inside_and_after_a_loop():
    inside = f"""%u = {STATE} tuple(%one, %y, %n)
  %v = {STATE} while(%u), condition=%v.check, body=%v.body
  %s = f32[16,32]{{1,0}} get-tuple-element(%v), index=1"""
    text = loops_of(0, 4, loop_of("v") + loop_of("w", inside=inside) + loop_of("z"), names="wz")
    assert count(text, AXES)[1:] == ({("a+b", "all_reduce"): 4 * 3 + 4}, ())


def test_the_check_of_a_loop_runs_once_more_than_its_body():
    text = loops_of(0, 3, loop_of("w", inside="%s = f32[16,32]{1,0} copy(%y)", check=SUM))
    assert count(text, AXES).messages == {("a+b", "all_reduce"): 4}


def test_trips_that_depend_on_an_outer_counter_are_unknown():
    def triangle(x):
        return lax.fori_loop(0, 5, lambda i, x: lax.fori_loop(i, 9, lambda _, x: moved_sum(x, "b"), x), x)

    sent, _, unknown = count(compiled(triangle, AXES, X), AXES)
    assert sent == {("b", "all_reduce"): 5 * sums(4, BYTES)} and len(unknown) == 1


HIDDEN = f"""%hidden (y: f32[16,32]) -> f32[16,32] {{
  %y = f32[16,32]{{1,0}} parameter(0)
  ROOT %s = f32[16,32]{{1,0}} all-reduce(%y), {EVERYONE}
}}
"""


@pytest.mark.parametrize(
    "line, says",
    [
        ("f32[16,32]{1,0} all-munge(%x), replica_groups={{0,1}}", "all-munge u: .* operands are 2048 bytes"),
        ("f32[16,32]{1,0} collective-munge-start(%x)", "collective-munge-start u: "),
        (f"f32[16,32]{{1,0}} ragged-all-to-all(%x, %x), {EVERYONE}", "ragged-all-to-all u: "),
        (f"f32[16,32]{{1,0}} all-gather(%odd), {EVERYONE}", "all-gather u: the size of dtype q7"),
        (f"(f32[16,32], q7[4]) all-reduce(%x, %odd), {EVERYONE}", "dtype q7 is not known; .* 2048 bytes of other"),
        (f"f32[16,32]{{1,0}} all-gather(%lost), {EVERYONE}", "all-gather u: not all of its operands"),
        (f"f32[16,32]{{1,0}} all-reduce(%x, %lost), {EVERYONE}", "all-reduce u: not all of its operands"),
        ("f32[16,32]{1,0} all-reduce(%x), replica_groups=everyone", "all-reduce u: who sends"),
        ("f32[16,32]{1,0} all-reduce(%x)", "all-reduce u: who sends"),
        (
            "f32[16,32]{1,0} collective-permute(%x, %x), source_target_pairs={{0,1}}, slice_sizes={{1,2}}",
            "who sends which",
        ),
        ('(f32[16,32], u32[]) send(%x), is_host_transfer=true, frontend_attributes={_xla_megascale_x="y"}', "send u: "),
        (
            'f32[16,32] custom-call(%x), custom_call_target="f", m={k={\n"a":"1"\n}}, c={"has_communication":true}',
            "custom-call u: ",
        ),
        ('f32[16,32] custom-call(%x), custom_call_target="some_AllReduce_v2"', "custom-call u: "),
        ('f32[16,32] custom-call(%x), custom_call_target="f", called_computations={%hidden}', "computation hidden: "),
        ("f32[64,32] fusion(%x), kind=kCustom, calls=%middle", "channel_id=3: no fusion begins"),
    ],
)
def test_unknown_is_never_a_zero(line, says):
    before = HIDDEN * ("hidden" in line) + CHAIN["middle"] * ("middle" in line)
    sent, messages, unknown = count(text_of("%odd = q7[4] constant(0)", f"%u = {line}", before=before), AXES)
    assert sent == {} and messages == {}
    assert len(unknown) == 1 and re.search(says, unknown[0]) and unknown[0].endswith(".")


def test_groups_along_no_axes_are_counted_and_told():
    text = compiled(lambda x: lax.psum(x, "b", axis_index_groups=[[0, 1], [2, 3]]), AXES, X)
    sent, _, unknown = count(text, AXES)
    assert sent == {("?", "all_reduce"): sums(2, BYTES)}
    assert len(unknown) == 1 and "such as [0, 1], lie along no axes of {'a': 2, 'b': 4}" in unknown[0]


@pytest.mark.parametrize("line", ["send(%x), is_host_transfer=true", 'custom-call(%x), custom_call_target="Sharding"'])
def test_what_stays_on_the_device_or_its_host_is_no_traffic(line):
    assert count(text_of(f"%y = f32[16,32]{{1,0}} {line}"), AXES) == ({}, {}, ())


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "no ENTRY computation in 0 characters"),
        (text_of(header="num_partitions=4"), "for 4 devices, the mesh .* has 8"),
        (text_of("%y = gibberish"), "no HLO instruction: '  %y = gibberish'"),
    ],
)
def test_text_that_cannot_be_counted_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        count(text, AXES)
