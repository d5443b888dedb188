"""
How fast, how lean and how accurate the non-local operation is, measured side by side with other
implementations: ``python -m nl_detectron.benchmark --help``.
"""
