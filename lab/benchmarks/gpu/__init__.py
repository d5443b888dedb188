"""All that only a GPU can show, in one report: ``make gpu-check``."""
