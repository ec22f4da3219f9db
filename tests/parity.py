"""What "equal" means in the tests."""

from typing import Any

import jax
import numpy as np


def assert_equal(got: Any, want: Any, tolerance: float) -> None:
    """Fail unless each leaf of `got` is within rounding of the same leaf of `want`.

    Equal means: largest difference <= tolerance x scale, where scale = max(largest value of the leaf in `want`,
    1e-3 x largest value of the whole tree `want`). A leaf that is zero in truth, such as the gradient of a key bias, is
    so compared at the scale of its tree and not of its own rounding. NaN equals nothing; equal infinities are equal.

    Args:
        got: A pytree of arrays, of any dtype and placement.
        want: The reference: the same structure and shapes.
        tolerance: Relative to the scale, so without unit; 0 asks for the same values.
    """
    got_leaves, got_structure = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_structure = jax.tree_util.tree_flatten_with_path(want)
    if got_structure != want_structure:
        raise AssertionError(f"the trees differ in structure:\n  got  {got_structure}\n  want {want_structure}")
    pairs = [
        (jax.tree_util.keystr(path) or "the value", _host(got_leaf), _host(want_leaf))
        for (path, got_leaf), (_, want_leaf) in zip(got_leaves, want_leaves, strict=True)
    ]
    floor = 1e-3 * max((_largest(want_leaf) for _, _, want_leaf in pairs), default=0.0)
    found = [_difference(*pair, tolerance=tolerance, floor=floor) for pair in pairs]
    wrong = [line for line in found if line]
    if wrong:
        head = f"{len(wrong)} of {len(found)} leaves differ by more than {tolerance:g} x scale:"
        raise AssertionError("\n  ".join([head, *wrong]))


def _host(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).astype(np.float64)


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), initial=0.0, where=np.isfinite(values)))


def _difference(name: str, got: np.ndarray, want: np.ndarray, *, tolerance: float, floor: float) -> str:
    """One line on the worst entry of a leaf; empty if the leaf is equal."""
    if got.shape != want.shape:
        return f"{name}: got shape {got.shape}, want {want.shape}"
    if got.size == 0:
        return ""
    with np.errstate(invalid="ignore"):
        distance = np.where(got == want, 0.0, np.abs(got - want))
    worst = np.unravel_index(np.argmax(distance), distance.shape)  # argmax finds NaN first
    scale = max(_largest(want), floor)
    if distance[worst] <= tolerance * scale:
        return ""
    entry = f"{name} at {tuple(map(int, worst))}" if worst else name
    share = f" = {distance[worst] / scale:.3g} x scale {scale:.3g}" if scale else ""
    return f"{entry}: got {got[worst]:.9g}, want {want[worst]:.9g}; off by {distance[worst]:.3g}{share}"
