"""The version: on its own, so that every layer can name it without the package's public names above it."""

__version__ = "0.1.0"
