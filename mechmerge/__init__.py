"""mechmerge: model merging with mechanism-aware recipes."""

__version__ = "0.1.0"
