"""What image models ask of their examples."""

from jaxpar.core.refuse import Problem, Refused


def sides(model: str, example: tuple[int, ...], *, halvings: int = 0, legal: str = "", space: int = 2) -> tuple:
    """Height and width of the images (of volumes: depth, height, width), once they are known to be large enough.

    Args:
        model: name of the model, for messages.
        example: shape of one example, channels last.
        halvings: how often the model halves each side; the last time there must be something to halve.
        legal: models or sizes that would do.
        space: dims of space.

    Raises:
        Refused: naming the model, what it asks and what it got.
    """
    shape = " x ".join(map(str, example))
    if len(example) != space + 1:
        words = "depth x height x width x channels" if space == 3 else "height x width x channels"
        rule = f"takes examples of {words}, and those of the data have the shape {shape}."
        raise Refused([Problem("model.name", model, rule, legal or "mlp, or other data")])
    if min(example[:-1]) < 2**halvings:
        rule = f"halves height and width {halvings} times, and the examples are {shape}: they have too few pixels."
        raise Refused([Problem("model.name", model, rule, legal or f"images of {2**halvings} pixels a side or more")])
    return tuple(example[:-1])
