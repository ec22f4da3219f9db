"""What every schedule promises, the closed forms of each, and that no wrong order or table gets through."""

import itertools
import math
import re
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxpar.core import family
from jaxpar.core.cells import KINDS, Cell, Order, wrong_cells
from jaxpar.core.makespan import Times, live, makespan, spans
from jaxpar.core.plan import Plan, order_of
from jaxpar.core.refuse import Refused
from jaxpar.core.replay import verify
from jaxpar.core.timetable import Slots, timetable
from jaxpar.report.timetables import picture, text
from jaxpar.schedules.from_table import from_table

SCHEDULES = [name for name in family.names("schedules") if name != "from_table"]
SIZES = [(p, m) for p in (2, 3, 4, 8) for m in sorted({p, 2 * p, 4 * p, 7})]
GOLDEN = Path(__file__).parent / "golden" / "timetables.txt"
quiet = settings(deadline=None, derandomize=True, database=None)


@cache
def chunks_of(name):
    """Stages per device that a schedule takes."""
    taken = []
    for chunks in (1, 2, 3):
        with suppress(Refused):
            family.pick("schedules", name)(2, 2, chunks)
            taken.append(chunks)
    return taken


@cache
def made(name, p, m, chunks=1):
    return timetable(family.pick("schedules", name)(p, m, chunks))


def cost(table, times=None):
    return makespan(table.order, table.at, times or Times())


# every schedule


@pytest.mark.parametrize(
    "p, m", [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (3, 7), (4, 4), (4, 9), (5, 13), (8, 7), (8, 16)]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_its_promises(name, p, m):
    assert chunks_of(name)
    for chunks in chunks_of(name):
        table = made(name, p, m, chunks)
        assert (table.devices, table.stages, table.microbatches) == (p, p * chunks, m)
        assert set(Counter(table.order.place).values()) == {chunks}
        assert len(table.at) == p * chunks * m * len(table.kinds)
        assert verify(table) == [] and table.in_order
        assert [table.chunk_of(stage) for stage in range(p)] == [0] * p
        found = cost(table)
        assert 3 * m - 1e-9 <= found.span <= found.lockstep_span + 1e-9
        assert found.bubble == pytest.approx(1 - 3 * m / found.span) and found.gap <= found.span - 3 * m + 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_other_chunks_are_refused(name):
    for chunks in {0, 1, 2, 3, 4} - {*chunks_of(name)} if len(chunks_of(name)) == 1 else {0}:
        with pytest.raises(Refused) as refused:
            order_of(Plan.parse(f"pipe=2,microbatches=2,schedule={name},chunks={chunks}"))
        (problem,) = refused.value.problems
        assert (problem.field, problem.value) == ("plan.chunks", chunks) and problem.legal[0] in "12"


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_device_and_one_microbatch(name):
    for chunks in chunks_of(name):
        found = cost(made(name, 1, 1, chunks))
        assert (found.span, found.bubble, found.messages) == (pytest.approx(3), pytest.approx(0), 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_work_alone_is_an_order(name):
    order = made(name, 4, 6, chunks_of(name)[0]).order
    table = timetable(order._replace(work=tuple(tuple(c for c in row if c.kind == "F") for row in order.work)))
    assert verify(table) == [] and table.kinds == ("F",)
    assert table.kept == table.between == table.cotangents == Slots({}, 0) and {kind for kind, _ in table.channels} == {
        "F"
    }


# closed forms, with F = 1 and B = 2, or F = B = W = 1


def ahead(p, d):
    return p - 1 - d


FORMS = {  # span, and inputs held on device d, for p devices, m microbatches, V chunks
    "naive": (lambda p, m, V: 3 * m * p, lambda p, m, V, d: 1),
    "gpipe": (lambda p, m, V: 3 * (m + p - 1), lambda p, m, V, d: m),
    "one_f_one_b": (lambda p, m, V: 3 * (m + p - 1), lambda p, m, V, d: min(m, p - d)),
    "eager_one_f_one_b": (lambda p, m, V: 3 * (m + p - 1), lambda p, m, V, d: min(m, 2 * ahead(p, d) + 1)),
    "interleaved": (
        lambda p, m, V: 3 * (max(m, p) * V + min(m, p) - 1) / V,
        lambda p, m, V, d: min(m * V, 2 * ahead(p, d) + (V - 1) * -(-m // max(1, m // p)) + 1),
    ),
    "zero_bubble_h1": (lambda p, m, V: 3 * m + p - 1 + max(0, p - m), lambda p, m, V, d: min(m, p)),
    "zero_bubble_h2": (
        lambda p, m, V: 3 * m + p - 1 + math.ceil(max(0, 2 * p - 2 - m) / 2),
        lambda p, m, V, d: min(m, 2 * p - 1),
    ),
    "zero_bubble_v": (
        lambda p, m, V: (6 * m + p - 1 + 2 * max(0, p - m)) / 2,
        lambda p, m, V, d: min(2 * m, 2 * p),
    ),
}


def test_every_schedule_has_a_closed_form():
    assert sorted(FORMS) == SCHEDULES


@pytest.mark.parametrize("name", SCHEDULES)
def test_span_bubble_and_memory_are_the_closed_forms(name):
    span, held = FORMS[name]
    for (p, m), chunks in itertools.product(SIZES, chunks_of(name)):
        table = made(name, p, m, chunks)
        found, want = cost(table), span(p, m, chunks)
        assert found.span == pytest.approx(want), (p, m, chunks)
        assert found.bubble == pytest.approx(1 - 3 * m / want), (p, m, chunks)
        assert found.peak == tuple(held(p, m, chunks, d) for d in range(p)), (p, m, chunks)
        neighbours = [2 - (d in (0, p - 1)) for d in range(p)]
        loops = 0 if name == "zero_bubble_v" else (chunks - 1) * 2 * m  # from the last device to the first and back
        ends = [loops // 2 * (d in (0, p - 1)) for d in range(p)]
        assert found.sends == tuple(m * chunks * n + e for n, e in zip(neighbours, ends, strict=True)), (p, m, chunks)


@pytest.mark.parametrize("p, m", [(2, 4), (3, 7), (4, 8), (8, 16)])
@pytest.mark.parametrize("times", [Times(1, 1, 1), Times(1, 1.2, 0.8), Times(1, 2, 1), Times(3, 2.5, 2)])
def test_zero_bubbles_for_any_times(p, m, times):
    forward, backward, weight, _ = times  # Qi et al. 2023, section 2.3
    one = cost(made("one_f_one_b", p, m), times)
    assert one.gap == pytest.approx((p - 1) * (forward + backward + weight))
    h1, h2 = (cost(made(f"zero_bubble_{name}", p, m), times) for name in ("h1", "h2"))
    assert h1.gap == pytest.approx((p - 1) * (forward + backward - weight))
    assert h2.gap == pytest.approx((p - 1) * (forward + backward - 2 * weight))
    assert h1.span == pytest.approx(h1.gap + m * (forward + backward + weight))


@pytest.mark.parametrize("p, m", SIZES)
def test_the_v_has_no_gap(p, m):
    if m >= p:
        assert cost(made("zero_bubble_v", p, m, 2)).gap == max(0, 2 * p - 1 - m) / 2


@pytest.mark.parametrize("p, m", [(p, m) for p, m in SIZES if m % p == 0])
def test_what_lock_step_costs(p, m):
    one, eager = made("one_f_one_b", p, m), made("eager_one_f_one_b", p, m)
    if p > 2:  # of two devices, one forward and one backward in a tick take no longer
        assert one.ticks == 2 * (m + p - 1) and cost(one).lockstep_span == p + 2 * (2 * (m + p - 1) - p)
    assert eager.ticks == m + 2 * (p - 1) and cost(eager).lockstep_span == 3 * (m + p - 1)
    for chunks in (2, 3):
        table = made("interleaved", p, m, chunks)
        assert table.ticks == m * chunks + p * chunks + p - 2
        assert cost(table).lockstep_span == pytest.approx(3 * (m * chunks + p - 1) / chunks)
    for name, chunks in (("h1", 1), ("h2", 1), ("v", 2)):
        found = cost(made(f"zero_bubble_{name}", p, m, chunks))
        assert found.lockstep_span == pytest.approx(found.span)


def test_latency_is_paid_once_a_message_or_once_a_tick():
    table = made("gpipe", 4, 1)
    assert cost(table, Times(latency=0.5)).span == 4 * 3 + 6 * 0.5
    assert cost(table, Times(latency=0.5)).lockstep_span == 4 * 3 + 0.5 * table.ticks
    assert cost(made("zero_bubble_v", 1, 3, 2), Times(latency=9)).span == 9  # nothing leaves the device


def test_times_are_of_whole_devices():
    times = Times(2, 3, 1)
    for name, chunks in (("gpipe", 1), ("interleaved", 3), ("zero_bubble_h1", 1), ("zero_bubble_v", 2)):
        assert cost(made(name, 2, 4, chunks), times).bubble == pytest.approx(
            1 - 24 / cost(made(name, 2, 4, chunks), times).span
        )


def test_memory_over_time():
    order = made("one_f_one_b", 2, 3).order
    began, ended = spans(order, Times())
    assert live(order, began, ended)[1] == [(0, 0), (1, 1), (10, 0)]
    assert live(order, began, ended)[0] == [(0, 1), (1, 2), (9, 1), (12, 0)]
    assert live(order, began, ended, stages=[0])[1] == [(0, 0)]


# known-good tables


def golden():
    for block in GOLDEN.read_text().split("\n\n"):
        head, *rows = block.splitlines()
        name, _, rest = head.partition(": ")
        figures = {key: values.split() for key, _, values in (item.partition(" ") for item in rest.split(", "))}
        yield name, figures, [re.findall("...", f"{row.partition('|')[2]}  ") for row in rows]


@pytest.mark.parametrize("name, figures, rows", [pytest.param(*one, id=one[0]) for one in golden()])
def test_known_tables(name, figures, rows):
    sizes = [int(figures[key][0]) for key in ("devices", "microbatches", "chunks")]
    table = made(name, *sizes)
    found = cost(table)
    drawn = [line.partition("|")[2].split() for line in text(table.order, width=1000).splitlines()]
    assert drawn == [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert (found.span, found.lockstep_span) == (float(figures["span"][0]), float(figures["lockstep"][0]))
    assert found.bubble == pytest.approx(float(figures["bubble"][0]), abs=5e-5)
    assert found.peak == tuple(map(int, figures["held"]))
    slots = table.ticks, table.activations.count, table.cotangents.count
    assert slots == tuple(int(figures[key][0]) for key in ("ticks", "activations", "cotangents"))


# wrong orders


def playable(order):
    """By brute force: whether every cell is there once, where it belongs, and can be done in some sequence."""
    kinds = KINDS[: max((KINDS.index(c.kind) + 1 for row in order.work for c in row), default=0)]
    stages, m = range(len(order.place)), 1 + max(c.microbatch for row in order.work for c in row)
    for device, row in enumerate(order.work):
        mine = [s for s in stages if order.place[s] == device]
        if Counter(row) != Counter(Cell(*parts) for parts in itertools.product(kinds, mine, range(m))):
            return False
    rows, done = [list(row) for row in order.work], set()
    before = {"F": lambda c: [("F", c.stage - 1)], "B": lambda c: [("F", c.stage), ("B", c.stage + 1)]}
    before["W"] = lambda c: [("B", c.stage)]
    while any(rows):
        able = [
            row
            for row in rows
            if row
            and all(
                (k, s, row[0].microbatch) in done for k, s in before[row[0].kind](row[0]) if 0 <= s < len(order.place)
            )
        ]
        if not able:
            return False
        done.update(row.pop(0) for row in able)
    return True


def mutated(draw, order):
    """`order` changed at one place, and the cells that were."""
    work = [list(row) for row in order.work]
    device = draw(st.sampled_from([d for d, row in enumerate(work) if row]))
    row = work[device]
    here, there = (draw(st.integers(0, len(row) - 1)) for _ in range(2))
    cell, how = (
        row[here],
        draw(st.sampled_from(["swap", "move", "drop", "twice", "kind", "stage", "microbatch", "device"])),
    )
    touched = [cell]
    if how == "swap":
        touched.append(row[there])
        row[here], row[there] = row[there], row[here]
    elif how == "move":
        row.insert(there, row.pop(here))
    elif how == "drop":
        row.pop(here)
    elif how == "twice":
        row.insert(there, cell)
    elif how == "device":
        work[draw(st.integers(0, order.devices - 1))].append(row.pop(here))
    else:
        values = {
            "kind": st.sampled_from(KINDS),
            "stage": st.integers(-1, order.stages),
            "microbatch": st.integers(-1, 9),
        }
        row[here] = cell._replace(**{how: draw(values[how])})
        touched.append(row[here])
    return order._replace(work=tuple(map(tuple, work))), touched


@settings(parent=quiet, max_examples=500)
@given(st.data())
def test_a_changed_order_is_refused_by_name_or_still_good(data):
    name = data.draw(st.sampled_from(SCHEDULES))
    p, m, chunks = (
        data.draw(st.integers(2, 4)),
        data.draw(st.integers(2, 6)),
        data.draw(st.sampled_from(chunks_of(name))),
    )
    good = made(name, p, m, chunks).order
    order, touched = mutated(data.draw, good)
    assume(order != good)
    if playable(order):
        table = timetable(order)
        assert verify(table) == [] and cost(table).span > 0
        assert table.order == order
    else:
        with pytest.raises(Refused) as refused:
            timetable(order)
        assert any(str(cell) in str(refused.value) for cell in touched), str(refused.value)
        assert {problem.field for problem in refused.value.problems} == {"plan.schedule"}


def test_what_waits_is_named():
    order = Order((0, 1), ((Cell("F", 0, 0), Cell("B", 0, 0)), (Cell("B", 1, 0), Cell("F", 1, 0))))
    with pytest.raises(Refused) as refused:
        timetable(order)
    told = str(refused.value)
    assert "device 1, 1st cell, B of microbatch 0 at stage 1: waits for F of microbatch 0 at stage 1" in told
    assert "comes later on the same device (device 1, 2nd cell, F of microbatch 0 at stage 1)" in told
    crossed = Order((0, 1, 0), ((Cell("F", 2, 0), Cell("F", 0, 0)), (Cell("F", 1, 0),)))
    with pytest.raises(
        Refused, match=r"device 1, 1st cell, F of microbatch 0 at stage 1 waits for .*comes later on device 0"
    ):
        timetable(crossed)


@pytest.mark.parametrize(
    "order, told",
    [
        (Order((0, 2), ((), ())), "stage 1 on device 2: there is no such device. Legal: 0 to 1"),
        (Order((0,), ((),)), "order: has no forward cell"),
        (Order((0,), ((("F", 0, 0),),)), "device 0, 1st cell, ('F', 0, 0): is no cell"),
        (Order((0,), ((Cell("F", 0, 0), Cell("G", 0, 0)),)), "2nd cell, G of microbatch 0 at stage 0: is no cell"),
        (Order((0,), ((Cell("F", 0, "0"),),)), "is no cell"),
        (Order((0,), ((Cell("F", True, 0),),)), "is no cell"),
        (
            Order((0, 1), ((Cell("F", 1, 0),), (Cell("F", 0, 0),))),
            "that stage does not lie on this device. Legal: stage 0",
        ),
        (Order((0,), ((Cell("F", 0, 0), Cell("W", 0, 0)),)), "B of microbatch 0 at stage 0: is missing"),
        (
            Order((0,), ((Cell("F", 0, 0), Cell("F", 0, 2)),)),
            "2nd cell, F of microbatch 2 at stage 0: most stages have 2",
        ),
        (Order((0,), ((Cell("F", 0, 0), Cell("F", 0, 0)),)), "stands twice: device 0, 1st cell"),
    ],
)
def test_what_is_no_order(order, told):
    with pytest.raises(Refused, match=re.escape(told)):
        timetable(order)


# wrong tables


def held(table, name):
    """First and last tick, both counted, in which a pool holds each value: from what the records say, by hand."""
    at, last = table.at, table.kinds[-1]
    wrote = {"activations": ("F", -1, 1), "cotangents": ("B", 1, 1), "kept": ("F", 0, 0), "between": ("B", 0, 0)}
    kind, step, late = wrote[name]
    return {
        (s, k): (at[Cell(kind, s + step, k)] + late, at[Cell(last, s, k)]) for s, k in getattr(table, name).of
    }  # fmt: skip


@settings(parent=quiet, max_examples=200)
@given(st.data())
def test_a_slot_that_is_taken_is_seen(data):
    name = data.draw(st.sampled_from(SCHEDULES))
    table = made(name, data.draw(st.integers(2, 4)), data.draw(st.integers(2, 6)), chunks_of(name)[-1])
    pool = data.draw(st.sampled_from([name for name in table._fields[3:7] if getattr(table, name).count > 1] or [None]))
    assume(pool)
    slots = getattr(table, pool)
    key = data.draw(st.sampled_from(sorted(slots.of)))
    slot = data.draw(st.integers(0, slots.count - 1))
    changed = table._replace(**{pool: slots._replace(of={**slots.of, key: slot})})
    times, place = held(table, pool), table.order.place
    clash = any(
        other != key and slots.of[other] == slot and place[other[0]] == place[key[0]]
        and times[other][0] <= times[key][1] and times[key][0] <= times[other][1]
        for other in slots.of
    )  # fmt: skip
    assert bool(verify(changed)) == clash


@pytest.mark.parametrize("name", SCHEDULES)
def test_slots_are_as_few_as_can_be(name):
    table = made(name, 4, 9, chunks_of(name)[-1])
    for pool in table._fields[3:7]:
        spans_ = held(table, pool)
        overlap = [
            sum(a <= tick <= b for (s, _), (a, b) in spans_.items() if table.order.place[s] == device)
            for device in range(4)
            for tick in range(table.ticks)
        ]
        assert getattr(table, pool).count == max(overlap)


@settings(parent=quiet, max_examples=200)
@given(st.data())
def test_a_cell_at_another_tick_is_seen(data):
    name = data.draw(st.sampled_from(SCHEDULES))
    table = made(name, data.draw(st.integers(2, 4)), data.draw(st.integers(2, 5)), chunks_of(name)[-1])
    cell = data.draw(st.sampled_from(sorted(table.at)))
    at = {**table.at, cell: table.at[cell] - data.draw(st.integers(1, 3))}
    row = table.order.work[table.order.place[cell.stage]]
    times = [(at[c], KINDS.index(c.kind)) for c in row]
    before = {"F": [("F", -1, 1)], "B": [("F", 0, 0), ("B", 1, 1)], "W": [("B", 0, 0)]}
    late = any(
        at[Cell(kind, c.stage + step, c.microbatch)] + gap > at[c]
        for c in table.at
        for kind, step, gap in before[c.kind]
        if 0 <= c.stage + step < table.stages
    )
    if at[cell] < 0 or late or times != sorted(set(times)):  # earlier than it can be, or where another cell is
        assert verify(table._replace(at=at))


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_table_lacks_is_seen(name):
    table = made(name, 3, 4, chunks_of(name)[-1])
    cell, kept = next(iter(table.at)), table.kept
    assert verify(table._replace(at={key: tick for key, tick in table.at.items() if key != cell}))
    assert verify(table._replace(channels=table.channels[1:]))
    assert verify(table._replace(channels=(*table.channels, ("F", 2 if ("F", 2) not in table.channels else 9))))
    assert verify(table._replace(kept=kept._replace(count=kept.count - 1)))
    assert verify(table._replace(activations=Slots({}, 0)))
    assert verify(table._replace(ticks=table.ticks + 1))
    assert verify(table._replace(order=table.order._replace(work=table.order.work[::-1])))


# tables and plans


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_table_gives_the_order_that_was_written(name, tmp_path):
    for chunks in chunks_of(name):
        order = family.pick("schedules", name)(3, 4, chunks)
        rows = [
            ["." if n % 3 else "", *(f"{c.stage}{c.kind}{c.microbatch}" for c in row), ""]
            for n, row in enumerate(order.work)
        ]
        path = tmp_path / f"{chunks}.csv"
        path.write_text("\n".join(",".join(row) for row in rows) + "\n\n")
        assert from_table(3, 4, chunks, rows) == from_table(3, 4, chunks, path) == order
        plan = Plan.parse(f"pipe=3,microbatches=4,chunks={chunks},schedule=from_table:{path}")
        assert order_of(plan) == order and timetable(order) == made(name, 3, 4, chunks)


def test_a_row_is_its_own_stage():
    rows = [["F0", "F1", ".", "B0", "", "B1"], [" ", "F0", "B0", "F1", "B1"]]
    assert from_table(2, 2, table=rows) == family.pick("schedules", "one_f_one_b")(2, 2)


@pytest.mark.parametrize(
    "rows, plan, told",
    [
        ("F0,G0", "pipe=1", "plan.schedule = row 0, column 1, 'G0': is no cell. Legal: F0, B0 or W0"),
        ("F0,F-1", "pipe=1", "'F-1': is no cell"),
        ("F0,F1234567", "pipe=1", "is no cell"),
        ("F0\nF0\nF0", "pipe=2", "plan.pipe = 2: the table has 3 rows, one per device. Legal: 3"),
        ("F0\n5F0", "pipe=2", "F of microbatch 0 at stage 5: there are 2 stages: plan.pipe times plan.chunks"),
        ("F0\n0F0", "pipe=2", "stage 0 lies on device 0 already"),
        ("F0\nF0", "pipe=2,chunks=2", "plan.schedule = stage 2: stands in no row. Legal: stages 0 to 3"),
        ("F0,B0\nF0,B0", "pipe=2,microbatches=3", "plan.microbatches = 3: plan.schedule"),
        ("F0,1F0,2F0\n3F0", "pipe=2,chunks=2", "plan.chunks = 2: plan.schedule"),
        ("B0,F0", "pipe=1", "device 0, 1st cell, B of microbatch 0 at stage 0: waits for F"),
        ("", "pipe=1", "plan.pipe = 1: the table has 0 rows"),
        ("\udcff", "pipe=1", "cannot be read"),
    ],
)
def test_a_wrong_table_is_refused(rows, plan, told, tmp_path):
    (tmp_path / "table.csv").write_bytes(rows.encode(errors="surrogateescape"))
    with pytest.raises(Refused, match=re.escape(told)):
        order_of(Plan.parse(f"schedule=from_table:{tmp_path / 'table.csv'},{plan}"))


@pytest.mark.parametrize(
    "plan, field, told",
    [
        ("schedule=gpip", "plan.schedule", "did you mean `gpipe`"),
        ("schedule=gpipe:8", "plan.schedule", "takes nothing after its name. Legal: gpipe"),
        ("schedule=from_table", "plan.schedule", "needs the path of a table. Legal: from_table:path/to/table.csv"),
        ("schedule=from_table:nowhere.csv", "plan.schedule", "there is no such file"),
        ("schedule=from_table:.", "plan.schedule", "there is no such file"),
        (
            "schedule=gpipe,chunks=2,pipe=2",
            "plan.chunks",
            "gpipe gives each device one stage. Legal: 1; or interleaved",
        ),
        ("schedule=zero_bubble_v,pipe=2", "plan.chunks", "gives each device two stages. Legal: 2"),
        ("schedule=nowhere.py:mine", "plan.schedule", "there is no file nowhere.py"),
        ("microbatches=0", "plan.microbatches", "must be at least 1"),
    ],
)
def test_a_plan_without_an_order_is_refused(plan, field, told):
    with pytest.raises(Refused, match=re.escape(told)) as refused:
        order_of(Plan.parse(plan))
    assert [problem.field for problem in refused.value.problems] == [field]


OWN = """
from jaxpar.core.cells import Cell, Order

def mine(stages, microbatches, chunks=1):
    place = tuple(range(stages))
    return Order(place, tuple(tuple(Cell(k, s, m) for m in range(microbatches) for k in "FB") for s in place))

def fewer(stages, microbatches, chunks=1):
    return mine(stages - 1, microbatches)

def swapped(stages, microbatches, chunks=1):
    order = mine(stages, microbatches)
    return order._replace(work=tuple(row[::-1] for row in order.work))

def none(stages, microbatches, chunks=1):
    return 3

def bare(stages):
    return mine(stages, 1)
"""


def test_a_schedule_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    sizes = "pipe=3,microbatches=2,schedule=own.py"
    assert order_of(Plan.parse(f"{sizes}:mine")) == family.pick("schedules", "naive")(3, 2)
    wrong = {
        "fewer": "plan.pipe = 3: plan.schedule = own.py:fewer is for 2 devices. Legal: pipe=2",
        "swapped": "device 0, 1st cell, B of microbatch 1 at stage 0: waits for F of microbatch 1 at stage 0",
        "none": "returned a value of type int",
        "bare": "`bare` cannot be called",
    }
    for name, told in wrong.items():
        with pytest.raises(Refused, match=re.escape(told)):
            order_of(Plan.parse(f"{sizes}:{name}"))


# pictures


def test_long_tables_go_on_below():
    order = made("interleaved", 2, 12, 2).order
    wide, narrow = text(order, width=1000).splitlines(), text(order, width=60).splitlines()
    assert all(len(line) <= 60 for line in narrow) and "Fb11" in text(order)
    for device, whole in enumerate(wide):
        parts = [line.partition("|")[2].split() for line in narrow if line.startswith(f"d{device} ")]
        assert [word for part in parts for word in part] == whole.partition("|")[2].split()


def test_times_that_do_not_divide_are_drawn_in_order():
    order = made("zero_bubble_h1", 3, 4).order
    for row, line in zip(order.work, text(order, Times(1, 1.5, 0.7, 0.2)).splitlines(), strict=True):
        assert [word for word in line.partition("|")[2].split() if word not in ".="] == [
            f"{c.kind}{c.microbatch}" for c in row
        ]


def test_pictures_are_drawn(tmp_path):
    orders = {name: made(name, 2, 3, chunks_of(name)[-1]).order for name in ("naive", "zero_bubble_v")}
    assert picture(tmp_path / "a.png", orders).read_bytes().startswith(b"\x89PNG")
    assert picture(tmp_path / "b.png", {"one": made("gpipe", 1, 1).order}, Times(1, 1, 0)).is_file()


def test_an_order_that_is_stuck_has_no_times():
    order = Order((0,), ((Cell("B", 0, 0), Cell("F", 0, 0)),))
    assert wrong_cells(order)
    with pytest.raises(ValueError, match="wait for each other"):
        spans(order, Times())
