"""Measurements that a figure or a limit of this project rests on. `python -m benchmarks` runs them all."""
