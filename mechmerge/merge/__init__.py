"""Merging: a recipe carried out by mergekit's executor, and the written model verified."""
