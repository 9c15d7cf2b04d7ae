"""Faults of the machine: a command that is killed, interrupted, starved of disk, misread, or disturbed by another one."""
