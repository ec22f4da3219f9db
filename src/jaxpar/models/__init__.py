"""Models, each written once; the plan decides where it runs."""
