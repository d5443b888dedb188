import json

import pytest

from nl_detectron.analysis.metrics import last_aps, metrics_file, read_metrics


def test_last_aps(tmp_path):
    assert last_aps(tmp_path) == {}
    records = [{"iteration": i, "total_loss": 1.0, "bbox/AP": 10.0 * i} for i in (1, 2)]
    records.append({"iteration": 3, "segm/AP75": 5.0, "segm/APs": 1.0, "segm/AP-person": 1.0})
    metrics_file(tmp_path).write_text("\n".join(map(json.dumps, records)))
    assert read_metrics(tmp_path) == read_metrics(tmp_path / "metrics.json") == records
    assert last_aps(tmp_path) == {"bbox/AP": 20.0, "segm/AP75": 5.0}


def test_broken_file_is_named(tmp_path):
    (tmp_path / "metrics.json").write_text('{"iteration": 1}\n{"iterat')
    with pytest.raises(ValueError, match=r"metrics\.json, line 2"):
        last_aps(tmp_path)
