"""Predicted beside compiled: what each device sends in a step, and where the two differ."""

from typing import NamedTuple

from jaxpar.core.cost import Cost
from jaxpar.report import account, hlo
from jaxpar.report.traced import shares_of
from jaxpar.step.parts import Parts


class Bill(NamedTuple):
    """Bytes that one device sends in one step.

    Attributes:
        predicted: from layouts and shapes, before anything was compiled; None where XLA decides the collectives.
        compiled: counted in the text of the compiled step.
        unknown: what the text says that could not be counted; if there is any, `compiled` may be too low.
    """

    predicted: Cost | None
    compiled: Cost
    unknown: tuple[str, ...]


def bill(parts: Parts, text: str) -> Bill:
    """The bill of the step whose compiled program is `text` (`compiled.as_text()`)."""
    counted = counted_in(parts, text)
    predicted = account.predicted(parts) if parts.partition == "manual" else None
    return Bill(predicted, Cost(counted.sent), counted.unknown)


def counted_in(parts: Parts, text: str) -> hlo.Traffic:
    """What is counted in a compiled program; of a pipeline that device which sends most."""
    axes = parts.settings.placement.scheme.axes or {"data": 1}
    each = [hlo.count(text, axes, one) for one in shares_of(parts)]
    return max(each, key=lambda found: sum(found.sent.values()))


def as_json(bill: Bill) -> dict:
    """`{"predicted": {axis: {collective: bytes}} or None, "compiled": ..., "warnings": [...]}`."""
    return {
        "predicted": by_axis(bill.predicted) if bill.predicted else None,
        "compiled": by_axis(bill.compiled),
        "warnings": [*bill.unknown, *differences(bill)],
    }


def differences(bill: Bill) -> list[str]:
    """One sentence for each axis and collective whose bytes are not those predicted."""
    return [
        f"{kind} over {axes}: predicted {predicted:,.0f} bytes, compiled {compiled:,.0f}"
        for axes, kind, predicted, compiled in rows(bill)
        if predicted is not None and abs(predicted - compiled) > 0.5
    ]


def rows(bill: Bill) -> list[tuple[str, str, float | None, float]]:
    """(axes, collective, predicted, compiled) in bytes, sorted; None if nothing was predicted."""
    predicted = bill.predicted.sent if bill.predicted else None
    keys = sorted({**(predicted or {}), **bill.compiled.sent})
    first = [None if predicted is None else predicted.get(key, 0.0) for key in keys]
    return [(*key, before, bill.compiled.sent.get(key, 0.0)) for key, before in zip(keys, first, strict=True)]


def table(bill: Bill) -> str:
    """Aligned text, a row per axis and collective and one for the sum."""
    total = ("all", "", bill.predicted and bill.predicted.total_sent, bill.compiled.total_sent)
    lines = [f"{'mesh axes':<14}{'collective':<16}{'predicted':>14}{'compiled':>14}  bytes per device and step"]
    lines += [
        f"{axes:<14}{kind:<16}{'n/a' if first is None else f'{first:,.0f}':>14}{second:>14,.0f}"
        for axes, kind, first, second in [*rows(bill), total]
    ]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in (*bill.unknown, *differences(bill)))])


def by_axis(cost: Cost) -> dict[str, dict[str, float]]:
    """Bytes sent, by mesh axes and then by collective."""
    found: dict[str, dict[str, float]] = {}
    for (axes, kind), value in cost.sent.items():
        found.setdefault(axes, {})[kind] = value
    return found
