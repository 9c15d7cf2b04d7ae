"""How the demo's two experts were trained: `python -m benchmarks.experts formats|arithmetic`."""
