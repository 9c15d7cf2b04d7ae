"""Behaviours: their files, the prompts of the built-in ones, generation and verifiers."""
