"""Where a behaviour lives: anchors, screening, weight patching, effects, and the files that hold them."""
