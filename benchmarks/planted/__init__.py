"""Planted truth: does localization find the components that were really trained?"""
