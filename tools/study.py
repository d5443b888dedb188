#!/usr/bin/env python3
"""Train several settings with several seeds, and compare them: `lab.study`, from any folder."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `lab` and `demo` are
    from lab.study.__main__ import main

    sys.exit(main())
