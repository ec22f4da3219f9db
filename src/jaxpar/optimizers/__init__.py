"""Optimizers: thin recipes over optax."""
