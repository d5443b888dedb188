"""Time and memory of the non-local operation beside others: ``python -m benchmarks --help``."""
