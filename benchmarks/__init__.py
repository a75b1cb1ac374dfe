"""Benchmarks that measure the figures and limits stated in the docs. `python -m benchmarks` runs all of them."""
