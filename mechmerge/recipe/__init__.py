"""Recipes: their schema, the policies and controls that make them, and what they are emitted as. No torch here."""
