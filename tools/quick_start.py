#!/usr/bin/env python3
"""Train a small detector, and show what it learnt: `demo.quick_start`, from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
    from demo.quick_start import main

    sys.exit(main())
