"""Takes train_net.py's arguments and writes what it writes, as the file ``behaviour`` beside the
runs' folders says."""

import json
import os
import sys
import time
from pathlib import Path

assert sys.argv[1:3] == ["--resume", "--config-file"]
assert Path(sys.argv[3]).is_file()
assert sys.argv[4] == "OUTPUT_DIR"
folder = Path(sys.argv[5])
behaviour = (folder.parent.parent / "behaviour").read_text().split()
with (folder / "starts").open("a") as starts:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    starts.write(json.dumps([os.getpid(), *map(os.environ.get, names)]) + "\n")
setting = folder.parent.name
if "hang" in behaviour:
    time.sleep(60)
if f"fail-{setting}" in behaviour:
    sys.exit("CUDA out of memory")
with (folder / "metrics.json").open("w") as metrics:
    seed = int(folder.name[-1])
    for iteration in (9, 19):
        ap = 40.0 + iteration + seed
        record = {"iteration": iteration, "bbox/AP": ap, "bbox/AP50": 2 * ap, "bbox/APs": 1.0}
        if "no-ap" in behaviour:
            record = {"iteration": iteration, "total_loss": 1.0}
        metrics.write(json.dumps(record) + "\n")
