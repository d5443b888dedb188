import os
import sys

import pytest
import torch

from nl_detectron.benchmark.cases import Case
from nl_detectron.benchmark.child import ChildError, default_memory_limit, run_in_child
from nl_detectron.benchmark.comparison import compare
from nl_detectron.benchmark.contestants import OURS, TEXTBOOK
from nl_detectron.benchmark.measure import FORWARD_BACKWARD, MEASURED, OUT_OF_MEMORY

CPU = torch.device("cpu")
MIB = 2**20
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="limits memory on Linux only")


def call(function, *arguments, memory_limit=None):
    return run_in_child(function, *arguments, device=CPU, threads=1, memory_limit=memory_limit)


def test_runs_in_a_process_of_its_own():
    assert call(os.getpid) != os.getpid()
    assert call(torch.get_num_threads) == 1


def test_errors_pass_through():
    with pytest.raises(ValueError, match="invalid literal"):
        call(int, "one")


def test_a_process_that_dies():
    with pytest.raises(ChildError, match="was killed"):
        call(os._exit, 1)


@only_linux
def test_who_runs_out_of_memory_says_how_much_it_asked_for():
    case = Case("res2", "concatenation", image_size=(384, 384))
    positions = 96 * 96
    rows = call(compare, case, CPU, 0.0, memory_limit=4 * positions**2)
    outcomes = {row.implementation: row.outcome for row in rows if row.which == FORWARD_BACKWARD}
    assert outcomes[OURS].status == MEASURED
    assert outcomes[TEXTBOOK].status == OUT_OF_MEMORY
    assert outcomes[TEXTBOOK].asked_bytes == 4 * positions**2


@only_linux
def test_a_limit_that_is_too_low():
    case = Case("res2", "dot_product", image_size=(256, 256))
    with pytest.raises(ChildError, match="too little"):
        call(compare, case, CPU, 0.0, memory_limit=MIB)


def test_default_memory_limit():
    assert MIB < default_memory_limit(CPU) <= 8 * 1024 * MIB
    assert default_memory_limit(torch.device("cuda")) is None
