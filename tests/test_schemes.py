"""What every tensor-parallel scheme promises: layouts that close, products that are derived, and what they cost."""

import re
from math import prod

import jax
import jax.numpy as jnp
import pytest

from jaxpar.core import compat, family
from jaxpar.core.plan import Plan, scheme_of
from jaxpar.core.recipe import Model, Recipe
from jaxpar.core.refuse import Refused
from jaxpar.plan import layout, mesh, product
from jaxpar.plan.context import Settings, context
from jaxpar.plan.layout import place
from jaxpar.plan.wire import ledger
from jaxpar.report.account import gradient_lines
from jaxpar.step.parts import assemble

TABLES = ("outer", "inner", "up", "down", "table", "across", "inside", "enter")
SIZES = {
    0: [()],
    1: [(1,), (2,), (3,), (8,)],
    2: [(1, 1), (1, 4), (4, 1), (2, 3), (2, 2)],
    3: [(1, 1, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 3, 1), (3, 2, 4)],
}
PRODUCTS = ("embed mlp", "mlp embed", "embed heads", "embed kv_heads", "heads embed", "embed vocab")
PRODUCTS += ("embed embed", "mlp mlp", "- embed", "- mlp", "vocab embed")


def tensors(name):
    """`plan.tensor` for one scheme, in several sizes."""
    count = len(family.parameters(family.pick("schemes", name)))
    return [":".join(filter(None, [name, "x".join(map(str, sizes))])) for sizes in SIZES.get(count, [(2,) * count])]


def numbers(tensor):
    """The sizes that `plan.tensor` gives."""
    return [int(size) for size in re.findall(r"\d+", tensor.partition(":")[2])]


TENSORS = [tensor for name in family.names("schemes") for tensor in tensors(name)]
each = pytest.mark.parametrize("tensor", TENSORS)


# layouts


@each
def test_layouts_use_own_axes_once(tensor):
    scheme = scheme_of(tensor)
    assert list(scheme.axes.values()) == numbers(tensor)
    for table in filter(None, (getattr(scheme, name) for name in TABLES)):
        axes = [axis for dim in table for axis in dim]
        assert len(table) == 2 and len(set(axes)) == len(axes) and set(axes) <= set(scheme.axes), table
    assert set(scheme.context) <= set(scheme.outer[0])
    assert not scheme.enter or scheme.enter[0] == ()  # `-` is never split


@pytest.fixture(params=["many sequences", "few sequences", "images"])
def placed(request, tensor):
    """A scheme on a model whose dims it all divides, but for the 3 whole features that enter; and sizes of dims."""
    scheme = scheme_of(tensor)
    parts = prod(scheme.axes.values())
    sizes = dict.fromkeys(layout.INNER, 4 * parts) | {"embed": 8 * parts, "-": 3}
    sizes |= {"batch": 4 * parts, "context": 2 * parts, "height": 5, "width": 7}
    if request.param == "few sequences":
        sizes["batch"] = layout.size(scheme, scheme.inner[0])
    if request.param == "images":
        del sizes["context"]
    return place(scheme, 1, {word: sizes[word] for word in ("batch", "context", "kv_heads") if word in sizes}), sizes


def local(placement, sizes, words, lies, dtype=jnp.float32):
    """One device's part of an array whose dims have these names."""
    shape = tuple(sizes[word] // layout.size(placement.scheme, axes) for word, axes in zip(words, lies, strict=True))
    return jax.ShapeDtypeStruct(shape, dtype)


@each
def test_every_product_ends_where_it_belongs(tensor, placed):
    placement, sizes = placed
    rows = ("batch", "context") if "context" in sizes else ("batch", "height", "width")
    book = ledger(placement.scheme.axes)
    ctx = context(Settings(placement, family.pick("policies", "fp32")(), book.wire))
    for dims in PRODUCTS:
        into, out = dims.split()
        x, y = (
            local(placement, sizes, (*rows, word), layout.activation(placement, word, len(rows) + 1))
            for word in (into, out)
        )
        w = local(placement, sizes, (into, out), layout.weight(placement, dims))
        if into == "vocab":
            x = local(placement, sizes, rows, layout.activation(placement, "-", len(rows) + 1)[:-1], jnp.int32)
            got = jax.eval_shape(ctx.lookup, w, x)
        else:
            got = jax.eval_shape(lambda x, w, dims=dims: ctx.dot(x, w, dims), x, w)
        assert got.shape == y.shape, dims


@each
@pytest.mark.parametrize("data", [1, 2])
def test_what_must_lie_alike_does(tensor, data):
    """A pair ends where it began; batches enter as inner rows; a tied table is its head, transposed."""
    scheme = scheme_of(tensor)
    placement = place(scheme, data, {"batch": 64, "context": 64})
    up, down = (product.route(placement, dims, 3) for dims in ("embed mlp", "mlp embed"))
    assert (up.x, up.y) == (down.y, down.x)
    for word in layout.INNER:
        assert layout.activation(placement, word, 3) == up.y
    assert layout.activation(placement, "-", 3) == (*up.y[:2], ())
    assert layout.weight(placement, "vocab embed")[::-1] == layout.weight(placement, "embed vocab")
    sizes = {"data": data} | scheme.axes
    assert placement.scheme.axes == {axis: size for axis, size in sizes.items() if size > 1}  # major first
    assert ("data" in layout.replicas(placement)) == (data > 1)


# bytes


SHAPE = {"batch": 96, "context": 48, "layers": 3, "width": 192, "heads": 24}


def lines_of(plan, **shape):
    """The bill of a GPT of `SHAPE`, but for what `shape` changes."""
    sizes = SHAPE | shape
    ids = jax.ShapeDtypeStruct((sizes["batch"], sizes["context"]), jnp.int32)
    batch = sizes.pop("batch")
    return gradient_lines(
        assemble(Recipe(model=Model("gpt", **sizes), plan=Plan.parse(plan), batch=batch), ids, ids, 256)
    )


def anonymous(lines, without="no such site"):
    return sorted(line._replace(axes=()) for line in lines if without not in line.site)


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_fsdp_is_three_d_along_one_axis(shards, data):
    one, other = (lines_of(f"data={data},tensor={scheme}") for scheme in (f"fsdp:{shards}", f"three_d:{shards}x1x1"))
    assert anonymous(one) == anonymous(other) and (len(one) > 10 or shards == data == 1)


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_sequence_is_three_d_along_one_axis(parts, data):
    # one splits its rows along the context and the other along the batch, unless there are too few sequences
    one, other = (lines_of(f"data={data},tensor={scheme}") for scheme in (f"sequence:{parts}", f"three_d:1x{parts}x1"))
    assert anonymous(one, "gradient of context") == anonymous(other, "gradient of context")
    few = [lines_of(f"tensor={scheme}", batch=1) for scheme in (f"sequence:{parts}", f"three_d:1x{parts}x1")]
    assert anonymous(few[0]) == anonymous(few[1])


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 2), (1, 4), (3, 2), (8, 1)])
def test_two_half_d_of_depth_one_is_two_d(rows, columns):
    one, other = (lines_of(f"tensor={scheme}{rows}x{columns}") for scheme in ("two_half_d:1x", "two_d:"))
    assert anonymous(one) == anonymous(other)


# elements that a device sends in the forward pass of a block: t rows of width h, in the group that shares a model
CLOSED_FORMS = {
    "single": lambda t, h: 0,
    "one_d": lambda t, h, n: 4 * t * h * (n - 1) / n,
    "sequence": lambda t, h, n: 4 * t * h * (n - 1) / n,
    "fsdp": lambda t, h, f: 12 * h**2 * (f - 1) / f,
    "two_d": lambda t, h, r, c: (7 * t * h * (c - 1) + 12 * h**2 * (r - 1)) / (r * c),
    "two_half_d": lambda t, h, d, r, c: (7 * t * h * (c - 1) / d + 12 * h**2 * (r - 1)) / (r * c),
    "three_d": lambda t, h, a, b, c: (4 * t * h * (b - 1) + 12 * h**2 * (a - 1) + 12 * t * h * (c - 1)) / (a * b * c),
}
# of which a backward pass that kept only shards gathers again
GATHERED_AGAIN = CLOSED_FORMS | {
    "one_d": lambda t, h, n: 0,
    "sequence": lambda t, h, n: 2 * t * h * (n - 1) / n,
    "three_d": lambda t, h, a, b, c: (2 * t * h * (b - 1) + 12 * h**2 * (a - 1) + 5 * t * h * (c - 1)) / (a * b * c),
}
POD = {"batch": 512, "context": 64, "layers": 2, "width": 1024, "heads": 64}  # for 64 and 512 devices
PODS = ["one_d:64", "sequence:64", "fsdp:512", "two_d:16x32", "two_d:64x1", "two_half_d:8x8x8", "three_d:8x8x8"]
PODS += ["three_d:2x8x4", "three_d:4x16x8", "two_half_d:2x8x4"]


def block_elements(lines, phase, layers):
    """Elements sent for the products of one block."""
    products = [line for line in lines if line.phase == phase and re.match(r"[xwy] of .*(heads|mlp)", line.site)]
    return sum(line.bytes for line in products) / 4 / layers


def assert_closed_form(tensor, data=1, **shape):
    lines, sizes = lines_of(f"data={data},tensor={tensor}", **shape), SHAPE | shape
    rows = sizes["batch"] * sizes["context"] / data
    # the products of a block transpose into as many bytes
    for phase, forms in {"forward": CLOSED_FORMS, "backward": CLOSED_FORMS, "regather": GATHERED_AGAIN}.items():
        want = forms[tensor.partition(":")[0]](rows, sizes["width"], *numbers(tensor))
        assert block_elements(lines, phase, sizes["layers"]) == pytest.approx(want, rel=1e-12), phase


@pytest.mark.parametrize("tensor", [tensor for tensor in TENSORS if tensor.partition(":")[0] in CLOSED_FORMS])
@pytest.mark.parametrize("shape", [{}, {"data": 2}, {"context": 24, "width": 288}], ids=str)
def test_bytes_of_a_block_are_the_closed_form(tensor, shape):
    assert_closed_form(tensor, **shape)


@pytest.mark.parametrize("tensor", PODS)
def test_a_bill_needs_no_devices(tensor, monkeypatch):
    def none(*args, **fields):
        raise AssertionError("a bill asked for devices")

    for owner, function in [(jax, "devices"), (jax, "local_devices"), (mesh, "devices"), (compat, "make_mesh")]:
        monkeypatch.setattr(owner, function, none)
    assert prod(scheme_of(tensor).axes.values()) in (64, 512)
    assert_closed_form(tensor, **POD)


OWN = """
from jaxpar.core.scheme import Scheme

def mine(t):
    return Scheme(axes={axes}, outer=((), ()), inner=((), {inner}), up=((), ("tensor",)), down=(("tensor",), ()))
"""


@pytest.mark.parametrize(
    "axes, inner, told",
    [
        ('{"tensor": t}', '("tensr",)', "`inner` names the axis 'tensr'.*did you mean `tensor`"),
        ('{"tensor": t}', '("tensor", "tensor")', "`inner` splits by 'tensor' more than once"),
        ('{"tensor": t, "data": 2}', '("tensor",)', "names an axis `data`, which is jaxpar's own"),
        ('{"tensor": t, "pipe": 2}', '("tensor",)', "names an axis `pipe`, which is jaxpar's own"),
    ],
)
def test_a_scheme_of_ones_own_is_read_closely(axes, inner, told, tmp_path):
    (tmp_path / "own.py").write_text(OWN.format(axes=axes, inner=inner))
    with pytest.raises(Refused, match=rf"plan.tensor = .*{told}"):
        scheme_of(f"{tmp_path}/own.py:mine:2")
