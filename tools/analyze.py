#!/usr/bin/env python3
"""Tell what the non-local blocks of a model cost: `lab.analyze`, from any folder."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
runpy.run_module("lab.analyze", run_name="__main__")
