"""The demonstrations: `demo.py`, `attention.py`, and what `make demo` runs."""
