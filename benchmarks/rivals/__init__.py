"""The job of `benchmarks.patching` written with other tools, each run in a process of its own.

These modules import nothing of mechmerge, so that they run under an interpreter that has the tool and not us.
"""
