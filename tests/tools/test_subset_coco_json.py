import json

import subset_coco_json
from tests.commands import run


def test_first_images(tmp_path):
    source, target = tmp_path / "all.json", tmp_path / "some.json"
    coco = {
        "images": [{"id": 7}, {"id": 3}, {"id": 5}],
        "annotations": [{"image_id": 5}, {"image_id": 3, "id": 1}, {"image_id": 7, "id": 2}],
        "categories": [{"id": 1}, {"id": 2}],
    }
    source.write_text(json.dumps(coco))
    done = run(subset_coco_json.__file__, source, target, "--images", 2)
    assert done.returncode == 0
    assert "2 images, 2 annotations" in done.stdout
    subset = json.loads(target.read_text())
    assert [image["id"] for image in subset["images"]] == [7, 3]
    assert [a["id"] for a in subset["annotations"]] == [1, 2]
    assert subset["categories"] == coco["categories"]
