#!/usr/bin/env python3
"""Tell what the non-local blocks of a model cost: `lab.analyze`, from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
    from lab.analyze import main

    sys.exit(main())
