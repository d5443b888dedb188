#!/usr/bin/env python3
"""Compare the saved predictions of two runs: `lab.compare_runs`, from any folder."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
runpy.run_module("lab.compare_runs", run_name="__main__")
