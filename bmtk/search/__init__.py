"""Hyper-parameter search: a recipe run again and again with other values, each time as a process of its own."""
