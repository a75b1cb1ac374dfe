"""Measurements behind figures and limits in the docs. `python -m benchmarks` runs all of them."""
