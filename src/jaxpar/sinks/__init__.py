"""Further places for the metrics of a run: one per file; none of them ever stops a run."""
