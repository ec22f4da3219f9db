"""Topologies by their word, the table of chips, and where devices lie in a mesh, without any compiler for them."""

import importlib.util
import math
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from jaxpar.core.refuse import Refused
from jaxpar.plan import mesh
from jaxpar.report import chips, compiled, topology

FIGURES = ("flops", "memory", "memory_rate", "near", "link", "network", "host", "clock", "price", "sparse", "shapes")


@pytest.mark.parametrize(
    "word, chip, shape, slices, count",
    [
        ("v5e:4x4", "v5e", (4, 4), 1, 16),
        ("V5E:1x1", "v5e", (1, 1), 1, 1),
        ("v5e:4x4*2", "v5e", (4, 4), 2, 32),
        ("v6e:16x16", "v6e", (16, 16), 1, 256),
        ("v5p:2x2x1", "v5p", (2, 2, 1), 1, 4),
        ("v5p:4x4x4", "v5p", (4, 4, 4), 1, 64),
        ("v5p:16x16x24*3", "v5p", (16, 16, 24), 3, 3 * 6144),
        ("v4:4x4x4", "v4", (4, 4, 4), 1, 64),  # megacore: a device per chip
        ("tpu7x:4x4x4", "tpu7x", (4, 4, 4), 1, 128),  # a device per core
        ("h100:1x8x8", "h100", (8, 8), 1, 64),
        ("h200:2x4x8", "h200", (4, 8), 2, 64),
    ],
)
def test_a_word_says_how_many_of_which_chip(word, chip, shape, slices, count):
    found = topology.parse(word)
    assert (found.word, found.chip.name, found.shape, found.slices) == (word, chip, shape, slices)
    assert found.count == count and found.platform == ("cuda" if chip.startswith("h") else "tpu")
    assert found.memory * count == pytest.approx(found.chip.memory * found.chips)


@pytest.mark.parametrize(
    "word, says",
    [
        ("", "is no topology"),
        ("v5e", "such as v5e:4x4, v5p:4x4x4, v5e:4x4.2 .slices. or h100:1x8x8"),
        ("v5e:4x4*", "is no topology"),
        ("v5e:4x", "is no topology"),
        ("v5litepod:4x4", "no chip v5litepod to compile for. .* Any of h100, h200, tpu7x, v4, v5e, v5p, v6e"),
        ("a100:1x1x8", "no chip a100 to compile for"),
        ("v5e:3x3", "v5e has no slice of this shape. Legal: v5e:1x1, v5e:2x2, .*v5e:16x16; .2 for 2 slices"),
        ("v5e:32x32", "no slice of this shape"),
        ("v5e:4x4x4", "no slice of this shape"),
        ("v5p:4x4", "no slice of this shape"),
        ("v5p:4x4x6", "v5p:2x2x1, v5p:2x2x2, v5p:2x2x4, v5p:2x4x4, or three multiples of 4 with up to 8960 chips"),
        ("v5p:0x4x4", "no slice of this shape"),
        ("v4:16x16x20", "no slice of this shape"),
        ("v5e:4x4*0", "needs a slice or more"),
        ("h100:8", "h100 takes slices x hosts x GPUs of a host. Legal: h100:1x1x8, h100:1x8x8"),
        ("h100:1x1x16", "1, 2, 4 or 8 GPUs of a host"),
        ("h100:0x1x8", "slices x hosts x GPUs"),
        ("h100:1x1x8*2", "slices x hosts x GPUs"),
    ],
)
def test_other_words_are_refused_with_what_is_legal(word, says):
    with pytest.raises(Refused, match=says) as refused:
        topology.parse(word)
    assert [problem.field for problem in refused.value.problems] == ["topology"]


@pytest.mark.parametrize("word, extra", [("v5e:2x4", "aot-tpu"), ("h100:1x1x8", "aot-cuda12")])
def test_a_missing_compiler_is_one_line_that_says_what_to_install(word, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=rf"which is not installed. Legal: pip install 'jaxpar\[{extra}\]'.$") as refused:
        topology.devices(topology.parse(word))
    assert len(str(refused.value).splitlines()) == 2


@pytest.fixture
def asked(monkeypatch):
    """What a topology asks jax for, and the environment then."""
    found = {}

    def described(**fields):
        found.update(fields, skips=os.environ.get("TPU_SKIP_MDS_QUERY"), hosts=os.environ.get("TPU_WORKER_HOSTNAMES"))
        return SimpleNamespace(devices=["device"])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topologies, "get_topology_desc", described)
    return found


@pytest.mark.parametrize(
    "word, fields",
    [
        ("v5e:4x4", {"platform": "tpu", "topology_name": "v5e:4x4"}),
        ("v5e:1x1", {"platform": "tpu", "topology_name": "v5e:1x1", "chips_per_host_bounds": (1, 1, 1)}),
        ("v5e:4x4*2", {"platform": "tpu", "topology_name": "v5e:4x4", "num_slices": 2}),
        ("v4:2x2x1", {"platform": "tpu", "topology_name": "v4:2x2x1", "chip_config_name": "megacore"}),
    ],
)
def test_a_tpu_is_asked_for_by_name_and_the_environment_put_back(word, fields, asked, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "mine")
    before = dict(os.environ)
    assert topology.devices(topology.parse(word)) == ["device"]
    assert asked == {**fields, "skips": "1", "hosts": "mine"} and dict(os.environ) == before


def test_a_gpu_is_asked_for_by_its_figures(asked):
    topology.devices(topology.parse("h200:1x8x8"))
    assert asked["platform"] == "cuda" and asked["topology"] == "1x8x8"
    text = asked["target_config"]
    assert "memory_bandwidth: 4800000000000  device_memory_size: 141000000000" in text and '"NVIDIA H200"' in text
    assert text.count("{") == text.count("}")


def test_what_jax_says_becomes_a_line(asked, monkeypatch):
    def fails(**fields):
        raise RuntimeError("INVALID_ARGUMENT: not divisible\nand much more")

    monkeypatch.setattr(topologies, "get_topology_desc", fails)
    with pytest.raises(Refused, match=r"the compiler says: INVALID_ARGUMENT: not divisible Legal: another shape.$"):
        topology.devices(topology.parse("v5e:2x4"))


@pytest.mark.parametrize("chip", chips.CHIPS, ids=lambda chip: chip.name)
def test_every_figure_of_a_chip_has_a_source_and_a_size_that_can_be(chip):
    assert chips.named(chip.name) is chip and all(chips.chip_of(kind) is chip for kind in chip.kinds)
    assert set(chip.sources) <= {*FIGURES, "ring", "*"} and all(map(chip.source, FIGURES))
    assert chip.assumed == chip.source("clock").startswith("assumed")
    for dtype, rate in chip.sparse.items():
        assert rate == pytest.approx(2 * chip.flops[dtype], rel=1e-3), "two of four weights"
    known = (chip.flops["bf16"], chip.memory, chip.memory_rate, chip.clock)
    limits = ((1e14, 1e16), (1e10, 1e12), (5e11, 1e13), (5e8, 5e9))
    for figure, (low, high) in zip(known, limits, strict=True):
        assert figure is None or low < figure < high
    assert (chip.torus in (2, 3)) == bool(chip.shapes) and chip.links in (0, 2 * chip.torus, 12, 18)


def test_a_peak_is_that_of_a_device_as_jax_counts_them():
    assert chips.peak("TPU7x") == 2307e12 / 2 and chips.peak("TPU v4") == 275e12


# Where devices lie in a mesh.
def chip_at(x, y, place):
    return SimpleNamespace(platform="tpu", device_kind="TPU v9", coords=(x, y, 0), core_on_chip=0, id=place)


def test_cpu_devices_lie_in_a_mesh_in_their_order():
    found = mesh.mesh_of({"a": 2, "b": 4}, jax.devices()[:8])
    assert [device.id for device in found.devices.flat] == [device.id for device in jax.devices()[:8]]
    assert found.shape == {"a": 2, "b": 4}


def test_neighbours_along_an_axis_are_neighbours_in_the_torus():
    held = [chip_at(x, y, 4 * y + x) for y in range(4) for x in range(4)]
    rng = np.random.default_rng(0)
    for axes in ({"a": 4, "b": 4}, {"a": 2, "b": 8}, {"a": 4, "b": 2, "c": 2}):
        placed = mesh.in_order(axes, rng.permutation(held))
        assert placed.shape == tuple(axes.values()) and len({device.id for device in placed.flat}) == 16
    placed = mesh.in_order({"a": 4, "b": 4}, rng.permutation(held))
    for row in (*placed, *placed.T):
        same = [len({device.coords[dim] for device in row}) for dim in (0, 1)]
        assert sorted(same) == [1, 4], "an axis of 4 is a row or a column of the torus"


def test_a_part_of_a_torus_is_taken_as_it_comes():
    held = [chip_at(x, y, 4 * y + x) for y in range(4) for x in range(4)][:6]
    assert [device.id for device in mesh.in_order({"a": 2, "b": 3}, held).flat] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "axes, slices, axis",
    [
        ({"data": 4, "t": 4}, 1, None),
        ({"data": 4, "t": 4}, 2, "data"),
        ({"pipe": 2, "data": 2, "t": 4}, 2, "data"),
        ({"pipe": 2, "data": 3, "t": 4}, 2, "pipe"),
        ({"data": 3, "shard": 4}, 2, "shard"),
        ({"data": 3, "shard": 5}, 2, None),
    ],
)
def test_slices_are_told_apart_along_data_first(axes, slices, axis):
    assert mesh.across_slices(axes, slices) == axis


@pytest.mark.parametrize(
    "word, axes, label, kind, rate",
    [
        ("v5e:4x4", {"data": 16}, "data", "all_gather", 5e10),  # a line: 4 is no ring
        ("v5e:16x16", {"data": 256}, "data", "all_gather", 1e11),  # a ring: both ways at once
        ("v5p:4x4x4", {"data": 64}, "data", "all_reduce", 2e11),
        ("v5p:4x4x4", {"data": 64}, "data", "permute", 1e11),
        ("v5p:2x2x1", {"data": 4}, "data", "all_reduce", 1e11),
        ("v5e:4x4*2", {"data": 32}, "slices", "all_reduce", 6.4e12 / 8 / 256),
        ("h100:1x8x8", {"data": 8, "shard": 8}, "shard", "all_gather", 450e9),  # within a host
        ("h100:1x8x8", {"data": 8, "shard": 8}, "data", "all_gather", 50e9),  # each through its own part of the network
        ("h100:1x8x8", {"data": 8, "shard": 8}, "data+shard", "all_gather", 400e9),  # a host's eight parts together
        ("h100:1x8x8", {"pipe": 8, "shard": 8}, "pipe", "permute", 50e9),
        ("h100:1x8x8", {"data": 16, "shard": 4}, "data", "all_gather", 100e9),  # two of each group in a host
        ("h100:1x8x8", {"pipe": 16, "shard": 4}, "pipe", "permute", 50e9),  # only one of which sends to another host
    ],
)
def test_an_axis_sends_as_fast_as_the_links_it_lies_on(word, axes, label, kind, rate):
    assert compiled.rates_of(axes, topology.parse(word)).link(label, kind) == pytest.approx(rate)


def test_gpus_have_no_clock_to_reckon_with():
    assert math.isinf(compiled.rates_of({"data": 8}, topology.parse("h100:1x1x8")).clock)
