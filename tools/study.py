#!/usr/bin/env python3
"""Train several settings with several seeds, and compare them: `lab.study`, from any folder."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
runpy.run_module("lab.study", run_name="__main__")
