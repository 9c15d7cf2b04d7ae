"""How experts are trained: `python -m benchmarks.experts formats|arithmetic|plain-arithmetic|json`."""
