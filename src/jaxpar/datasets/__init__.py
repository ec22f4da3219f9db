"""Data as a pure function of the step: one dataset per file."""
