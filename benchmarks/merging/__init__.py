"""Do mechanism-aware recipes beat what people merge with today? `python -m benchmarks.merging`."""
