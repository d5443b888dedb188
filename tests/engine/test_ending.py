"""Every way out of a training ends its processes within seconds, with the status that is said."""

import signal
import socket
import time

import pytest

from tests.commands import ROOT, shared_commands
from tests.engine.small_config import SMALL

pytestmark = pytest.mark.slow

TRAIN_NET, LAZY_TRAIN_NET = ROOT / "train_net.py", ROOT / "tools" / "lazy_train_net.py"
SECONDS = 20  # a step, a checkpoint and the exit take about one
STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.fixture
def start(tmp_path):
    """Starts train_net.py with two loader workers; as some of the processes of one run, if many."""

    def start_all(*words, world_size=1, script=TRAIN_NET):
        own = ["DATALOADER.NUM_WORKERS", "2", "SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", tmp_path]
        words = [*SMALL, "SOLVER.MAX_ITER", "10000", *own, *words]
        if world_size == 1:
            return [shared_commands().start(tmp_path / "output.txt", script, *words)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        size = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        size.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return [
            shared_commands().start(
                tmp_path / f"output{rank}.txt", script, *words, RANK=rank, LOCAL_RANK=rank, **size
            )
            for rank in range(world_size)
        ]

    return start_all


@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", STATUSES)
def test_a_signal(number, to_group, start):
    (run,) = start()
    run.wait_for("Starting training")
    time.sleep(0.7)  # in a step
    run.send(number, to_group=to_group)
    assert run.wait(SECONDS) == STATUSES[number]
    assert run.printed.count(f"Stopped by {number.name}, iteration: ") == 1
    assert "Traceback" not in run.printed


def test_not_a_number(start):
    (run,) = start("SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_ITERS", "0")
    assert run.wait(60) == 1
    assert "FloatingPointError: " in run.printed


def test_out_of_memory_in_one_of_two_ranks(start):
    ranks = start("MODEL.NONLOCAL.BACKBONE", "build_hungry_backbone", world_size=2)
    assert [rank.wait(60) for rank in ranks] == [1, 1]
    assert "rank 0 of 2 has lost another: " in ranks[0].printed
    assert "rank 1 of 2 failed: MemoryError: no more memory\n" in ranks[1].printed


@pytest.mark.parametrize("times", [1, 2], ids=["one_rank", "all_and_passed_on"])
def test_a_signal_to_ranks(times, start):
    """A scheduler sends it to all processes, and torchrun passes on its own."""
    ranks = start(world_size=2)
    ranks[0].wait_for("Starting training")
    time.sleep(0.7)
    for _ in range(times):
        for rank in ranks[2 - times :]:
            rank.send(signal.SIGTERM, to_group=True)
    assert [rank.wait(SECONDS) for rank in ranks] == [143, 143]


LAZY = """
from detectron2.config import LazyCall
from nl_detectron import model_zoo
from small_runs import build_small_model

_config = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_nl_1x.py")
dataloader, lr_multiplier, optimizer, train = (
    _config[name] for name in ("dataloader", "lr_multiplier", "optimizer", "train")
)
for _loader in (dataloader.train, dataloader.test):
    _loader.dataset.names = "few_val"
    _loader.num_workers = 2
    _loader.mapper.augmentations[0].short_edge_length = 32
    _loader.mapper.image_format = "BGR"
dataloader.train.total_batch_size = 2
dataloader.evaluator.output_dir = {!r}
model = LazyCall(build_small_model)()
train.max_iter = 2
train.init_checkpoint = ""
"""


def test_the_end_of_a_lazy_config(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(LAZY.format(str(tmp_path)))
    output = f"train.output_dir={tmp_path}"
    words = [LAZY_TRAIN_NET, *SMALL[:2], "--config-file", config, output]
    run = shared_commands().start(tmp_path / "o.txt", *words)
    assert run.wait(60) == 0, run.printed
    assert (tmp_path / "model_final.pth").exists()


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
runpy.run_path({!r}, run_name="__main__")
"""


def test_too_few_open_files(start, tmp_path):
    script = tmp_path / "train_net.py"
    script.write_text(LIMITED.format(str(TRAIN_NET)))
    (run,) = start(script=script)
    assert run.wait(SECONDS) == 2
    assert run.printed.splitlines()[-1].startswith(
        "train_net.py: error: ulimit -n is 24, but 2 loader workers (DATALOADER.NUM_WORKERS) may "
    )
