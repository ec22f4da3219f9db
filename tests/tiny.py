"""The smallest run there is, shared so that its step is compiled once for many tests."""

from jaxpar.core.recipe import Data, Model, Recipe

TINY = Recipe(
    model=Model("mlp", layers=2, width=16, dropout=0.1),
    data=Data("digits"),
    batch=8,
    steps=10,
    warmup=1,
    evaluate_every=5,
    evaluate_batches=2,
    checkpoint_every=4,
)
