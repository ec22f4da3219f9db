"""jaxpar: write a model once as pure functions, choose by name how it is laid out, get an exact bill of what it costs.

Each name is imported when it is first used, so `from jaxpar import Recipe, Plan` does not import jax.
"""

import importlib

_PUBLIC = {
    "Recipe": "core.recipe",
    "Model": "core.recipe",
    "Data": "core.recipe",
    "Plan": "core.plan",
    "Refused": "core.refuse",
    "family": "core.family",
    "Layer": "core.types",
    "Context": "core.types",
    "State": "core.types",
    "Dataset": "core.types",
    "Scheme": "core.scheme",
    "Policy": "core.policy",
    "Cost": "core.cost",
    "simulate": "plan.mesh",
    "Parts": "step.parts",
    "prepare": "step.parts",
    "Parallel": "step.parallelize",
    "parallelize": "step.parallelize",
    "Program": "step.program",
    "program": "step.program",
    "Run": "train.run",
    "fit": "train.fit",
    "sample": "train.sample",
    "table": "report.bill",
    "losses_picture": "report.pictures",
    "Interrupted": "train.stop",
    "NonFinite": "train.stop",
    "NotSaved": "train.stop",
    "quiet": "train.progress",
    "runner": "cli",
    "doctor": "commands.doctor",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"jaxpar has no {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(f"jaxpar.{_PUBLIC[name]}")
    return getattr(home, name, home)  # `family` is the module itself


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
