"""Tensor-parallel schemes, one table of layouts per file."""
