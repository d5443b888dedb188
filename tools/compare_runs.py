#!/usr/bin/env python3
"""Compare the saved predictions of two runs: `lab.compare_runs`, from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
    from lab.compare_runs import main

    sys.exit(main())
