#!/usr/bin/env python3
"""Train a small detector, and show what it learnt: `demo.quick_start`, from any folder."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
runpy.run_module("demo.quick_start", run_name="__main__")
