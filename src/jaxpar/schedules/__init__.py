"""Orders of pipeline work, one schedule per file."""
