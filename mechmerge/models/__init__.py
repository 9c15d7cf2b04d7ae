"""Models: references, architecture families, components, checkpoints, pairs."""
