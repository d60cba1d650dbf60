"""The embedded default: a tiny base model, and the generator of its task."""
