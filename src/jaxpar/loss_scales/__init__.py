"""Loss scales: what gradients are multiplied by on their way back."""
