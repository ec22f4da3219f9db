"""What `python -m jaxpar` can do: one command per file, called with the words after its name."""
