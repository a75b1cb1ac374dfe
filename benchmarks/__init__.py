"""The benchmarks. They measure the numbers and limits that the docs state. `python -m benchmarks` runs all
benchmarks."""
