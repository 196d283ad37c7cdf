"""Hyper-parameter search: a recipe run many times with different values, each time in a process of its own."""
