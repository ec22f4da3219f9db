"""A Plan: how one step is spread over devices and time, as plain values that fit in one string."""

import dataclasses
from dataclasses import dataclass

from jaxpar.core import family
from jaxpar.core.cells import Order, wrong_cells
from jaxpar.core.refuse import Problem, Refused, near_miss, refuse
from jaxpar.core.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """Mesh, tensor scheme, schedule, memory and precision of a run.  `Plan.parse(str(plan)) == plan`.

    Attributes:
        data: devices on the data axis.
        tensor: scheme and its sizes: `single`, `one_d:T`, `sequence:T`, `fsdp:F`, `two_d:RxC`, `two_half_d:DxRxC` or
            `three_d:IxJxK`.
        pipe: devices on the pipeline axis.
        schedule: order of pipeline work, such as `gpipe`, `from_table:path/to/table.csv` or `path/to/file.py:name`.
        chunks: model chunks per pipeline device.
        microbatches: parts of a batch that are worked on one after the other, gradients summed.
        storage: what a pipeline stage keeps: `recompute` or `residual`.
        zero: ZeRO stage over the data axis, 0 to 3.
        zero_group: devices of the data axis that share out one copy; 0 for all that hold copies.
        remat: what the backward pass computes again.
        regather: inside a scan over blocks, gather operands again in the backward pass rather than keep them; and under
            ZeRO stage 3 gather parameters for every block, forward and back, rather than once per step.
        ring: overlap gathers with products, piece by piece.
        unroll: blocks unrolled (`true`), in one scan (`false`), or as is faster (`auto`).
        offload: what rests in the memory of the host: any of `parameters+optimizer+activations`, or `none`.
        precision: a member of policies/.
        partition: `manual` (every collective derived here) or `auto` (left to XLA).
        reducer: a member of reducers/: how gradients are summed over data.
    """

    data: int = 1
    tensor: str = "single"
    pipe: int = 1
    schedule: str = "one_f_one_b"
    chunks: int = 1
    microbatches: int = 1
    storage: str = "recompute"
    zero: int = 0
    zero_group: int = 0
    remat: str = "none"
    regather: bool = True
    ring: bool = False
    unroll: str = "auto"
    offload: str = "none"
    precision: str = "fp32"
    partition: str = "manual"
    reducer: str = "mean"

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """A plan from `"field=value,field=value"`; fields that are not named keep their defaults.

        Raises:
            Refused: naming every key that is unknown or given twice, and every value of the wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values, problems = {}, []
        for item in filter(None, (item.strip() for item in text.split(","))):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                problems.append(
                    Problem("plan", repr(item), "is not of the form field=value.", "data=2,tensor=two_d:2x2")
                )
            elif key not in fields:
                problems.append(Problem(f"plan.{key}", value, "there is no such field.", near_miss(key, fields)))
            elif key in values:
                problems.append(Problem(f"plan.{key}", value, "is given twice.", f"{key}={value}, once"))
            else:
                try:
                    values[key] = _read(type(fields[key].default), value)
                except ValueError as error:
                    legal = f"{key}={_written(fields[key].default)}"
                    problems.append(Problem(f"plan.{key}", value or "(nothing)", str(error), legal))
                    values[key] = None
        if problems:
            raise Refused(problems)
        return cls(**values)

    def __str__(self) -> str:
        """The fields that differ from their defaults, in order; `data=1` if none does."""
        fields = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        items = [f"{name}={_written(value)}" for name, value, default in fields if value != default]
        return ",".join(items) or "data=1"


def _written(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read(kind: type, text: str):
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("must be true or false.")
        return text.lower() == "true"
    if kind is int:
        if not text.removeprefix("-").isdecimal():
            raise ValueError("must be a whole number.")
        return int(text)
    if not text:
        raise ValueError("must not be empty.")
    return text


def scheme_of(tensor: str) -> Scheme:
    """The scheme that `plan.tensor` names, such as `"two_d:2x4"`.

    Raises:
        Refused: for an unknown name (with the likeliest), a wrong number of sizes, or a size below 1.
    """
    path, python, rest = tensor.rpartition(".py:")
    name, _, sizes = rest.partition(":")
    member = family.pick("schemes", path + python + name, "plan.tensor")
    wanted = family.parameters(member)
    form = ":".join([name, "x".join(wanted)]) if wanted else name
    given = sizes.split("x") if sizes else []
    if len(given) != len(wanted) or not all(size.isdecimal() and int(size) > 0 for size in given):
        rule = f"{name} needs {len(wanted)} sizes of at least 1, as in {form}." if wanted else f"{name} takes no sizes."
        legal = ":".join(filter(None, [name, "x".join(["2"] * len(wanted))]))
        raise Refused([Problem("plan.tensor", tensor, rule, legal)])
    found = member(*map(int, given))
    refuse(_of_tables(tensor, found))
    return found


def _of_tables(tensor: str, scheme: Scheme) -> list[Problem]:
    """Layouts of a user's own scheme that cannot be, and would pass: an axis that is none simply splits nothing."""
    problems = [
        Problem("plan.tensor", tensor, f"names an axis `{axis}`, which is jaxpar's own.", "another name")
        for axis in ("data", "group", "pipe")
        if axis in scheme.axes
    ]
    if problems:
        return problems
    for field in ("outer", "inner", "up", "down", "table", "across", "inside", "enter"):
        axes = [axis for dim in getattr(scheme, field) or () for axis in dim]
        for axis in dict.fromkeys(axes):
            if axis not in scheme.axes:
                rule = f"`{field}` names the axis {axis!r}, which is none of the scheme's."
                problems.append(Problem("plan.tensor", tensor, rule, near_miss(axis, scheme.axes)))
            elif axes.count(axis) > 1:
                rule = f"`{field}` splits by {axis!r} more than once."
                problems.append(Problem("plan.tensor", tensor, rule, "each axis once in an array"))
    return problems


def order_of(plan: Plan) -> Order:
    """The order of pipeline work that `plan.schedule` names, for the plan's devices, chunks and microbatches.

    Raises:
        Refused: for an unknown name (with the likeliest), for counts that the schedule does not take, and for an order
            of the user's own that has other counts or that nobody could play.
    """
    counts = {"pipe": plan.pipe, "chunks": plan.chunks, "microbatches": plan.microbatches}
    refuse(Problem(f"plan.{name}", count, "must be at least 1.", "1") for name, count in counts.items() if count < 1)
    own = ".py:" in plan.schedule
    name, colon, table = (plan.schedule, "", "") if own else plan.schedule.partition(":")
    member = family.pick("schedules", name, "plan.schedule")
    takes_table = not own and "table" in family.parameters(member)
    if bool(table) != takes_table or (colon and not table):
        rule = "needs the path of a table." if takes_table else "takes nothing after its name."
        raise Refused(
            [Problem("plan.schedule", plan.schedule, rule, f"{name}:path/to/table.csv" if takes_table else name)]
        )
    fields = {"stages": plan.pipe, "microbatches": plan.microbatches, "chunks": plan.chunks}
    order = member(**fields, **({"table": table} if takes_table else {}))
    refuse(wrong_cells(order) or _of_order(plan, order))
    return order


def _of_order(plan: Plan, order: Order) -> list[Problem]:
    """Counts of an order that are not those of the plan."""
    held = [order.place.count(device) for device in range(plan.pipe)]
    if order.devices != plan.pipe:
        rule = f"plan.schedule = {plan.schedule} is for {order.devices} devices."
        return [Problem("plan.pipe", plan.pipe, rule, f"pipe={order.devices}")]
    if order.stages != plan.pipe * plan.chunks or set(held) != {plan.chunks}:
        rule = (
            f"plan.schedule = {plan.schedule} has {', '.join(map(str, held))} stages on devices 0 to {plan.pipe - 1}."
        )
        legal = f"chunks={held[0]}" if len(set(held)) == 1 else "an order with as many stages on every device"
        return [Problem("plan.chunks", plan.chunks, rule, legal)]
    if order.microbatches != plan.microbatches:
        rule = f"plan.schedule = {plan.schedule} is for {order.microbatches} microbatches."
        return [Problem("plan.microbatches", plan.microbatches, rule, f"microbatches={order.microbatches}")]
    return []
