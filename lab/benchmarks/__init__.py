"""Time and memory of the non-local operation beside others: ``python -m lab.benchmarks --help``."""
