"""Parts of models, written once against the Context."""
