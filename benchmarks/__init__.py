"""The benchmarks. They measure the figures and limits that the docs state. `python -m benchmarks` runs all
benchmarks."""
