"""Planted truth: whether localization finds the components that were really trained."""
