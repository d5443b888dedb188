"""``python -m lab.mutants``."""

import subprocess

import pytest

from lab import mutants

SOURCE = '''
LIMIT = 3

def double(values):
    """Twice each."""
    if len(values) > 2:
        raise ValueError(f"{len(values) + 1}")
    return [value * 2 for value in values]
'''
TESTS = (
    "from nl_detectron.twice import double\n\n\ndef test_one():\n    assert double([3]) == [6]\n"
)


@pytest.fixture
def root(tmp_path):
    for name, text in {"nl_detectron/twice.py": SOURCE, "tests/test_twice.py": TESTS}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True, timeout=60)
    return tmp_path


def names(root):
    return [f.name for f in mutants.faults(root, root / "nl_detectron" / "twice.py")]


def test_faults_are_of_functions_and_not_of_messages(root):
    assert sorted(names(root)) == [
        "twice.py double: 2 -> 3",
        "twice.py double: 2 -> 3 #2",
        "twice.py double: len(values) > 2 -> len(values) >= 2",
        "twice.py double: raise ValueError(f'{len(values) + 1}') -> pass",
        "twice.py double: return [value * 2 for value in values] -> return None",
        "twice.py double: value * 2 -> value / 2",
    ]


def test_a_change_elsewhere_leaves_the_names(root):
    before = names(root)
    file = root / "nl_detectron" / "twice.py"
    file.write_text("def above(x):\n    return x + 1\n\n\n" + file.read_text())
    assert set(before) < set(names(root))


def test_each_room_has_its_share():
    every = [
        f for file in mutants.modules(mutants.ROOT) for f in mutants.faults(mutants.ROOT, file)
    ]
    rooms = {fault.room for fault in every}
    chosen = mutants.sample(every, 2 * len(rooms))
    assert sorted(f.room for f in chosen) == sorted([*rooms, *rooms])
    for fault in chosen:
        compile(fault.source, fault.module, "exec")


@pytest.mark.slow
def test_tells_what_the_tests_miss(root, capsys):
    before = (root / "nl_detectron" / "twice.py").read_text()
    assert mutants.main(["--root", str(root), "--seconds", "60"]) == 1
    output = capsys.readouterr().out
    for fault in (
        "value * 2 -> value / 2",
        "return [value * 2 for value in values] -> return None",
    ):
        assert f"caught     twice.py double: {fault}" in output
    assert "survived   twice.py double: len(values) > 2 -> len(values) >= 2" in output
    assert (root / "nl_detectron" / "twice.py").read_text() == before
