"""Long-running measurements and trainings: `python -m benchmarks.NAME [--quick] [--save]`."""
