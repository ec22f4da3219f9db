"""How gradients are summed over the data axis."""
