"""Bad data of every kind: what is said of it, in one line, and that nothing hangs."""

import json
import logging
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from nl_detectron.data import pictures, register_coco_json
from nl_detectron.data.coco_checks import check_coco, in_one_line, without_bad
from nl_detectron.data.coco_format import rle_counts
from nl_detectron.engine.setup import use_own_data

NAN, INFINITY = float("nan"), float("inf")
WIDTH, HEIGHT = 64, 48
PIXELS = WIDTH * HEIGHT
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def sound_coco():
    sizes = {"width": WIDTH, "height": HEIGHT}
    boxes = [[10, 10, 20, 20], [5, 5, 20, 20], [0, 0, 64, 48]]
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", **sizes} for i in (1, 2, 3)],
        "annotations": [
            {
                "id": 11 + i,
                "image_id": 1 + i,
                "category_id": 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": SQUARE,
                "keypoints": [12, 12, 2, 20, 20, 1],
                "num_keypoints": 2,
            }
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cat", "keypoints": ["nose", "tail"]}],
    }


@pytest.fixture
def data(tmp_path):
    """A sound dataset, the folder of its pictures, and what registers it."""
    coco = sound_coco()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    for image in coco["images"]:
        Image.fromarray(pixels).save(tmp_path / image["file_name"])

    def register(**options):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(coco))
        register_coco_json("mine", path, tmp_path, **options)

    yield coco, tmp_path, register
    DatasetCatalog.pop("mine", None)
    MetadataCatalog.pop("mine", None)


def change(section, index, **values):
    return lambda coco: coco[section][index].update(values)


def annotation(**values):
    return change("annotations", 1, **values)


def image(**values):
    return change("images", 1, **values)


def category(**values):
    return change("categories", 0, **values)


def one_more_category(**values):
    return lambda coco: coco["categories"].append(values)


def without(section, key):
    return lambda coco: coco[section][0].pop(key)


def all_of(**values):
    def apply(coco):
        for i, a in enumerate(coco["annotations"]):
            a.update({k: f"{v}-{i}" if k == "id" else v for k, v in values.items()})

    return apply


def rle(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size), "counts": counts}


def compressed(shape=(HEIGHT, WIDTH)):
    return mask_util.encode(np.eye(*shape, dtype=np.uint8, order="F"))["counts"].decode()


OF_A_WRONG_KIND = {
    "annotations": {
        "bbox": [
            *([1, 2, NAN, 4], [1, 2, INFINITY, 4], [-INFINITY, 2, 3, 4], [0, 0, 1e30, 4]),
            *([0, 0, 10**400, 4], ["1", "2", "3", "4"], [True] * 4, [1, 2, 3], [1, 2, 3, 4, 5]),
            *([], [[1, 2, 3, 4]], None, {"x": 1}),
        ],
        "segmentation": [
            # polygons: of two points, one and none, odd, not finite, huge, of texts, badly nested
            *([[1, 1, 5, 5]], [[1, 1]], [[]], [*SQUARE, [1, 1, 5, 5]], [[1, 1, 5, 5, 9, 9, 3]]),
            *([[1, 1, 5, 5, 9, last]] for last in (NAN, INFINITY, 1e9)),
            *([["1"] * 6], SQUARE[0], [[[1, 1], [5, 5], [9, 9]]], "cat.png", 7),
            # RLEs: too short, too long, negative, of floats, of nothing, without counts or size
            *(rle([5, 3]), rle([5, PIXELS]), rle([PIXELS + 5, -5]), rle([PIXELS / 2] * 2), rle([])),
            *({"size": [48, 64]}, {"counts": [PIXELS]}, rle([PIXELS], [PIXELS]), rle([0], [0, 64])),
            # compressed: cut off, too long, of another size, endless, of other letters, negative
            *(rle(compressed()[:-5]), rle(compressed() + "111"), rle(compressed(), [9, 9])),
            *(rle(compressed() + "o"), rle("o" * 100 + "0"), rle("~~~"), rle("ä" * 8), rle("")),
            rle("PI" * 4),
        ],
        "keypoints": [[1, 1, 2, NAN, 1, 2], ["1"] * 6, [None] * 6],
        "num_keypoints": ["2"],
        "id": [[1]],
        "category_id": [1.0, True],
        "image_id": [[1]],
        "iscrowd": [2, "no"],
        "ignore": [1],
        "area": [NAN, INFINITY, "x"],
    },
    "images": {
        "id": [2.0, 2**63],
        "width": [0],
        "height": [-1, 47.5, NAN],
        "file_name": [2, None],
    },
    "categories": {"id": [-(2**63) - 1, None], "name": [7], "keypoints": [[1, 2]]},
}
LEGAL = {  # how the message ends
    "bbox": "[x, y, width, height], four finite numbers",
    "segmentation": "whose counts sum up to the size) nor a list of polygons",
    "keypoints": "a list of n",
    "num_keypoints": "a number",
    "iscrowd": "0 or 1",
    "area": "a number",
    "width": "an integer from 1 to 1000000",
    "height": "an integer from 1 to 1000000",
    "file_name": "a text",
    "name": "a text",
}
ERRORS = {
    "no box": (without("annotations", "bbox"), "no bbox"),
    "all boxes negative": (all_of(bbox=[20, 20, -5, -5]), "no box"),
    "all boxes empty": (all_of(bbox=[20, 20, 0, 0]), "no box"),
    "all boxes outside": (all_of(bbox=[70, 20, 5, 5]), "no box"),
    "all boxes relative": (all_of(bbox=[0.1, 0.2, 0.5, 0.5]), "boxes not in pixels"),
    "RLE turned": (annotation(segmentation=rle([PIXELS], [WIDTH, HEIGHT])), "RLE of another size"),
    "RLE of another size": (annotation(segmentation=rle([100], [10, 10])), "RLE of another size"),
    "compressed RLE of another size": (
        annotation(segmentation=rle(compressed((9, 9)), [9, 9])),
        "RLE of another size",
    ),
    "too few keypoints": (annotation(keypoints=[1, 1, 2]), "wrong number of keypoints"),
    "too many keypoints": (annotation(keypoints=[1, 1, 2] * 3), "wrong number of keypoints"),
    "keypoints in pairs": (annotation(keypoints=[1, 1, 2, 2]), "wrong number of keypoints"),
    "unknown category": (annotation(category_id=9), "unknown category_id"),
    "unknown image": (annotation(image_id=9), "unknown image_id"),
    "image id a text": (annotation(image_id="1"), "unknown image_id"),
    "annotation null": (lambda coco: coco["annotations"].append(None), "no object"),
    "annotation a list": (lambda coco: coco["annotations"].append([1]), "no object"),
    "two images of one id": (image(id=1), "repeated id"),
    "ids of numbers and texts": (image(id="2"), "mixed ids"),
    "image without a height": (without("images", "height"), "no height"),
    "image of extreme shape": (image(width=50_000), "extreme shape"),
    "image of extreme size": (image(width=50_000, height=50_000), "extreme shape"),
    "no picture": (image(file_name="nowhere.png"), "missing picture"),
    "file name of zeros": (image(file_name="\0"), "missing picture"),
    "file name a folder": (image(file_name="."), "missing picture"),
    "two categories of one id": (one_more_category(id=1, name="dog"), "repeated id"),
    "category without a name": (without("categories", "name"), "no name"),
}
SKELETONS = ([[0, 1]], [[16, 14], [1, 2]], [[1, 2, 3]], [["nose", "tail"]], [[1.0, 2.0]], [1, 2])
WARNINGS = {
    "negative box": (annotation(bbox=[30, 30, -10, 5]), "negative box"),
    "empty box": (annotation(bbox=[5, 5, 0, 20]), "empty box"),
    "box outside": (annotation(bbox=[64, 5, 5, 5]), "box outside"),
    "box above": (annotation(bbox=[5, -9, 5, 5]), "box outside"),
    "box partly outside": (annotation(bbox=[5, 5, 70, 5]), "box partly outside"),
    "box two pixels to the left": (annotation(bbox=[-2, 5, 9, 5]), "box partly outside"),
    "box two pixels too low": (annotation(bbox=[5, 5, 9, 45]), "box partly outside"),
    "two annotations of one id": (annotation(id=11), "repeated id"),
    "two images of one file": (image(file_name="1.png"), "repeated file"),
    "two categories of one name": (one_more_category(id=2, name="cat"), "repeated name"),
    "visibility 3": (annotation(keypoints=[1, 1, 3, 2, 2, 2]), "wrong visibility"),
    "visibility -1": (
        annotation(keypoints=[1, 1, -1, 2, 2, 2], num_keypoints=1),
        "wrong visibility",
    ),
    "num_keypoints of others": (annotation(num_keypoints=1), "wrong num_keypoints"),
    "a long image": (image(width=1000), "extreme shape"),
    # keypoints of the categories, which are of no concern to a model of boxes
    **{f"skeleton {s}": (category(skeleton=s), "wrong skeleton") for s in (*SKELETONS, "1-2")},
    "keypoints of one name": (category(keypoints=["nose", "nose"]), "repeated keypoint"),
    "a keypoint of one side": (category(keypoints=["nose", "left_ear"]), "keypoint of one side"),
    "names that look paired": (category(keypoints=["lsho", "rsho"]), "keypoint of one side"),
    "different keypoints": (
        one_more_category(id=2, name="dog", keypoints=["ear"]),
        "different keypoints",
    ),
    # areas, on which evaluation depends
    "a negative area": (annotation(area=-400), "wrong area"),
    "an area above COCO's ranges": (annotation(area=1e11), "wrong area"),
    "the same area everywhere": (all_of(area=7), "one area"),
    "areas of 1": (all_of(area=1.0), "one area"),
    "relative areas": (
        lambda coco: [a.update(area=0.1 + 0.1 * i) for i, a in enumerate(coco["annotations"])],
        "areas not in pixels",
    ),
    # what cannot be trained on
    "no mask": (lambda coco: coco["annotations"][0].pop("segmentation"), "no mask"),
    "a mask of no polygon": (annotation(segmentation=[]), "no mask"),
    "mask null": (annotation(segmentation=None), "no mask"),
    "all crowds": (all_of(iscrowd=1), "all crowds"),
    "no annotations, so none of the root category either": (
        lambda coco: (
            coco["annotations"].clear(),
            one_more_category(id=2, name="dog", supercategory="cat")(coco),
        ),
        "no annotations",
    ),
    "a root category that nothing has": (
        lambda coco: (
            one_more_category(id=0, name="animals", supercategory="none")(coco),
            category(supercategory="animals")(coco),
        ),
        "unused root category",
    ),
}
FINE = {
    "sound": lambda coco: None,
    "a box a pixel outside on all sides": annotation(bbox=[-1, -1, 66, 50]),
    "a category as its own supercategory": category(supercategory="cat"),
    "a category that nothing has": one_more_category(id=2, name="dog", supercategory="dog"),
    "the same area of the same boxes": all_of(bbox=[5, 5, 20, 20], area=400),
    "no num_keypoints": without("annotations", "num_keypoints"),
    "a skeleton": category(skeleton=[[1, 2]]),
    "no skeleton": category(skeleton=None),
    "whole sizes as floats": image(width=64.0, height=48.0),
    "no masks at all": lambda coco: [a.pop("segmentation") for a in coco["annotations"]],
    "area 0": annotation(area=0),
    "area null": annotation(area=None),
    "annotation ids of texts": all_of(id="6f1c"),
    "annotation ids of floats": annotation(id=2.0),
}


@pytest.mark.parametrize("change", FINE.values(), ids=FINE)
def test_nothing_is_wrong(data, change, caplog):
    coco, folder, register = data
    change(coco)
    assert check_coco(coco, folder, "decoded") == []
    caplog.set_level(logging.WARNING, "nl_detectron")  # another test may have set it
    register(pictures="header")
    assert not caplog.text


@pytest.mark.parametrize(("spoil", "kind"), ERRORS.values(), ids=ERRORS)
def test_errors(data, spoil, kind):
    coco, folder, register = data
    spoil(coco)
    errors = [problem for problem in check_coco(coco, folder) if problem.is_error]
    assert kind in {problem.kind for problem in errors}
    expected = FileNotFoundError if kind == "missing picture" else ValueError
    with pytest.raises(expected) as error:
        register()
    assert str(error.value).startswith(f"{folder / 'mine.json'}: ")
    assert errors[0].text in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 800
    assert "mine" not in DatasetCatalog


WRONG_VALUES = [
    (section, key, value)
    for section, values_of in OF_A_WRONG_KIND.items()
    for key, values in values_of.items()
    for value in values
]


@pytest.mark.parametrize(
    ("section", "key", "value"), WRONG_VALUES, ids=lambda x: repr(x)[:30].strip("'")
)
def test_values_of_a_wrong_kind(data, section, key, value):
    coco, folder, _ = data
    test_errors(data, change(section, 0, **{key: value}), f"wrong {key}")
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77]
    (text,) = {p.text for p in check_coco(coco, folder) if p.kind == f"wrong {key}"}
    assert text.startswith(f"{section}[0] has {key} {shown}")
    assert LEGAL.get(key, "") in text.partition(", not ")[2]


@pytest.mark.parametrize(("spoil", "kind"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(data, spoil, kind, caplog):
    coco, folder, register = data
    spoil(coco)
    assert {(p.is_error, p.kind) for p in check_coco(coco, folder)} == {(False, kind)}
    with caplog.at_level(logging.WARNING):
        register()
    (message,) = (record.message for record in caplog.records)
    assert message.startswith(str(folder / "mine.json"))
    assert len(message.splitlines()) == 1


def test_places_and_ids_are_named(data):
    coco, folder, _ = data
    coco["annotations"].insert(0, None)
    coco["annotations"][2].update(bbox=[5, 5, 0, 5])
    coco["annotations"][3].update(keypoints=[1])
    coco["images"][0].update(file_name="a.png")
    texts = [problem.text for problem in check_coco(coco, folder)]
    assert texts[0].startswith("annotations[0] is None, not an object")
    assert texts[1] == f"images[0] 'a.png' (id 1) is not in {folder}"
    assert texts[2] == (
        "annotations[2] has bbox [5, 5, 0, 5], which is empty, in a picture of 64 x 48 "
        "(id 12, image_id 2)"
    )
    assert texts[3].startswith("annotations[3] has 1 numbers in 'keypoints'")
    assert texts[3].endswith("(id 13, image_id 3)")
    line = in_one_line(check_coco(coco, folder))
    assert "4 in all (1 x no object, 1 x missing picture, 1 x empty box, " in line


def jpeg(path, size=(WIDTH, HEIGHT), **options):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, "JPEG", **options)


def cut(path):
    jpeg(path)
    path.write_bytes(path.read_bytes()[:-500])


def cut_png(path):
    path.write_bytes(path.read_bytes()[:-500])


def break_png(path):
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT") + 4
    content[start : start + 50] = b"\xff" * 50
    path.write_bytes(content)


def exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


def turned(path, orientation=6):
    jpeg(path, exif=exif(orientation))


def tiff(orientation, size=(WIDTH, HEIGHT)):
    return lambda path: Image.new("RGB", size).save(path, "TIFF", exif=exif(orientation))


def sixteen_bits(path):
    Image.fromarray(np.full((HEIGHT, WIDTH), 30_000, np.uint16)).save(path)


def floats(path):
    Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, np.float32)).save(path, "TIFF")


PICTURES = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "a text": (lambda path: path.write_text("no picture"), "does not decode: cannot identify"),
    "a web page": (lambda path: path.write_text("<html>404</html>"), "does not decode"),
    "a header alone": (lambda path: path.write_bytes(path.read_bytes()[:40]), "does not decode"),
    "truncated JPEG": (cut, "does not decode"),
    "truncated PNG": (cut_png, "does not decode"),
    "another size": (lambda path: jpeg(path, (32, 32)), "is 32 x 32"),
    "turned by EXIF": (turned, "is 48 x 64"),
    "a TIFF on its side": (tiff(6), "is a TIFF file with orientation 6, which is applied twice"),
    "a turned TIFF": (tiff(8, (HEIGHT, WIDTH)), "is a TIFF file with orientation 8"),
    "a mirrored TIFF": (tiff(2), "is a TIFF file with orientation 2"),
    "a TIFF upside down": (tiff(3), "is a TIFF file with orientation 3"),
    "recorded turned": (lambda path: jpeg(path, (HEIGHT, WIDTH)), "is 48 x 64"),
    "16 bits": (sixteen_bits, "has more than 8 bits"),
    "floats": (floats, "has more than 8 bits"),
}


@pytest.mark.parametrize("pictures", ["header", "decoded"])
@pytest.mark.parametrize(("spoil", "text"), PICTURES.values(), ids=PICTURES)
def test_pictures(data, spoil, text, pictures):
    coco, folder, register = data
    spoil(folder / "2.png")
    (problem,) = check_coco(coco, folder, pictures)
    assert problem.is_error
    assert f"images[1] '2.png' (id 2) {text}" in problem.text
    with pytest.raises(ValueError, match=f"'2.png' \\(id 2\\) {text}") as error:
        register(pictures=pictures)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("pictures", ["header", "decoded"])
@pytest.mark.parametrize(
    "options", [{"progressive": True}, {"exif": exif(1)}, {"icc_profile": b"p" * 70_000}]
)
def test_jpeg_files(data, options, pictures):
    coco, folder, _ = data
    path = folder / "2.png"
    jpeg(path, **options)
    assert check_coco(coco, folder, pictures) == []
    coco["images"][1].update(width=HEIGHT, height=WIDTH)
    assert "is 64 x 48" in check_coco(coco, folder, pictures)[0].text
    path.write_bytes(path.read_bytes()[:-100])
    assert "does not decode" in check_coco(coco, folder, pictures)[0].text


@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("eval_only", [False, True])
def test_pictures_of_a_run_are_looked_at(data, which, eval_only):
    """Those to train on, if it trains, and those to evaluate on."""
    coco, folder, _ = data
    cfg = get_cfg()
    files = []
    for name in ("train", "val"):
        (folder / name).mkdir()
        for i in (1, 2, 3):
            shutil.copy(folder / f"{i}.png", folder / name)
        (folder / f"{name}.json").write_text(json.dumps(coco))
        files += [str(folder / f"{name}.json"), str(folder / name)]
    sixteen_bits(folder / which / "2.png")
    try:
        if which == "train" and eval_only:
            use_own_data(cfg, *files, eval_only=True)
        else:
            message = rf"{which}\.json: images\[1\] '2.png' \(id 2\) has more than 8 bits a value"
            with pytest.raises(ValueError, match=message):
                use_own_data(cfg, *files, eval_only=eval_only)
    finally:
        for name in ("train", "val"):
            DatasetCatalog.pop(name, None)
            MetadataCatalog.pop(name, None)


def test_a_broken_middle_is_found_by_decoding(data):
    coco, folder, _ = data
    break_png(folder / "2.png")
    assert check_coco(coco, folder, "header") == []
    (problem,) = check_coco(coco, folder, "decoded")
    assert "does not decode" in problem.text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_are_read_as_detectron2_does(data, orientation):
    coco, folder, _ = data
    turned(folder / "2.png", orientation)
    height, width = read_image(str(folder / "2.png"), "BGR").shape[:2]
    coco["images"][1].update(width=width, height=height)
    coco["annotations"][1].update(bbox=[1, 1, 9, 9])
    assert check_coco(coco, folder, "header") == check_coco(coco, folder, "decoded") == []


@pytest.mark.parametrize("orientation", [0, 1, 99])
def test_a_tiff_file_as_it_is(data, orientation):
    coco, folder, _ = data
    tiff(orientation)(folder / "2.png")
    assert check_coco(coco, folder, "header") == check_coco(coco, folder, "decoded") == []


def test_pictures_beyond_a_thread_s_share(data, monkeypatch):
    coco, folder, _ = data
    monkeypatch.setattr(pictures, "_AT_ONCE", 2)
    (folder / "3.png").write_bytes(b"")
    (problem,) = check_coco(coco, folder, "header")
    assert "'3.png' (id 3) is empty" in problem.text


@pytest.mark.parametrize(
    ("file_name", "cause"),
    [
        ("a\\2.png", "backslashes"),
        ("train/2.png", "but {root}/2.png is there"),
        ("/data/2.png", "but {root}/2.png is there"),
        ("2.PNG", "but {root}/2.png is there"),
        (" 2.png", "but {root}/2.png is there"),
    ],
)
def test_why_a_picture_is_missing(data, file_name, cause):
    coco, folder, _ = data
    coco["images"][1]["file_name"] = file_name
    (problem,) = check_coco(coco, folder)
    assert problem.kind == "missing picture"
    assert cause.format(root=folder) in problem.text


def test_ids_of_another_type_are_named_as_the_cause(data):
    coco, folder, _ = data
    all_of(image_id="1")(coco)
    assert "image_id '1', not among the images, where it is a number" in in_one_line(
        check_coco(coco, folder)
    )


@pytest.mark.parametrize("seed", range(5))
def test_rle_counts_are_those_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    mask = np.asfortranarray(rng.random((70, 90)) < rng.choice([0.001, 0.1, 0.5, 0.999]), np.uint8)
    flat = mask.ravel(order="F")
    ends = [*np.flatnonzero(np.diff(flat)) + 1, flat.size]
    counts = [0] * int(flat[0]) + np.diff([0, *ends]).tolist()
    assert rle_counts(mask_util.encode(mask)["counts"].decode()) == counts


def test_without_bad(data):
    coco, folder, _ = data
    coco["images"].append({"id": 4, "file_name": "3.png", "width": WIDTH, "height": HEIGHT})
    for i, values in enumerate(({"bbox": [NAN] * 4}, {"bbox": [1, 1, 0, 5]}, {"num_keypoints": 1})):
        coco["annotations"].append({**coco["annotations"][0], "id": 20 + i, **values})
    coco["annotations"].append({**coco["annotations"][0], "id": 30, "image_id": 4})
    coco["annotations"].append({**coco["annotations"][0], "id": 31, "segmentation": []})
    (folder / "2.png").write_bytes(b"")
    clean = without_bad(coco, check_coco(coco, folder, "decoded"))
    assert [i["id"] for i in clean["images"]] == [1, 3]
    assert [a["id"] for a in clean["annotations"]] == [11, 13, 22]
    assert [p.kind for p in check_coco(clean, folder, "decoded")] == ["wrong num_keypoints"]


def test_a_byte_order_mark_is_skipped(data):
    coco, folder, _ = data
    path = folder / "mark.json"
    path.write_text(json.dumps(coco), encoding="utf-8-sig")
    register_coco_json("mine", path, folder)
    assert len(DatasetCatalog.get("mine")) == 3
