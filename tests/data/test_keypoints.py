"""Which keypoints change sides in a flip, by the names that published sets give them."""

import pytest

from nl_detectron.data.keypoints import keypoint_warnings, mirror_pairs

FORMS = {
    "COCO": (["nose", "left_eye", "right_eye", "left_hip", "right_hip"], 2),
    "AnimalPose": (["L_Eye", "R_Eye", "L_EarBase", "R_EarBase", "Nose", "L_F_Paw", "R_F_Paw"], 3),
    "CrowdPose": (["left_shoulder", "right_shoulder", "top_head", "neck"], 1),
    "MPII": (["r ankle", "l ankle", "pelvis", "upper neck", "r wrist", "l wrist"], 2),
    "AP-10K": (["L_Eye", "R_Eye", "Nose", "Neck", "Root of tail", "L_Shoulder", "R_Shoulder"], 2),
    "Vinegar Fly": (["head", "eyeL", "eyeR", "forelegR1", "forelegL1", "midlegL4", "midlegR4"], 3),
    "Locust": (["head", "anttipL", "anttipR", "forelegL1", "forelegR1", "abdomen1"], 2),
    "Human-Art": (["left_finger", "right_finger", "left_toe", "right_toe"], 2),
    "AnimalKingdom": (["Head_Mid_Top", "Eye_Left", "Eye_Right", "Ankle_Left ", "Ankle_Right "], 2),
    "COCO-WholeBody": (
        ["left_big_toe", "right_big_toe", "face-0", "left_thumb1", "right_thumb1"],
        2,
    ),
    "OneHand10K": (["wrist", "thumb1", "thumb2", "middle_finger1", "ring_finger1"], 0),
    "DeepFashion": (["left_collar", "right_collar", "left_hem", "right_hem"], 2),
    "horse": (["Nose", "Eye", "Nearknee", "Offknee"], 0),
    "macaque": (["nose", "left_ear", "right_ear"], 1),
    "zebra": (["snout", "head", "forelegL1", "forelegR1", "hindlegL1", "hindlegR1", "tailtip"], 2),
    "OpenPose": (["Nose", "RShoulder", "LShoulder", "REye", "LEye"], 2),
    "capitals": (["LEFT_EYE", "RIGHT_EYE", "EYE_L", "EYE_R", "MIDLEFTEAR", "MIDRIGHTEAR"], 3),
    "camelCase": (["leftEye", "rightEye", "lShoulder", "rShoulder", "hipLeft", "hipRight"], 3),
    "side last": (["eye_l", "eye_r", "ear.L", "ear.R", "paw left", "paw right"], 3),
    "in the middle": (
        ["front_left_paw", "front_right_paw", "Mouth_Back_Left", "Mouth_Back_Right"],
        2,
    ),
    "side alone": (["left", "right", "L1", "R1"], 2),
    "run together": (["lefteye", "righteye"], 1),
}


def opposite(name):
    """The name with every l for an r, and the like; enough to tell sides apart in a test."""
    return name.lower().replace("left", "right").replace("l", "r")


@pytest.mark.parametrize(("names", "count"), FORMS.values(), ids=FORMS)
def test_published_forms(names, count):
    pairs = mirror_pairs(names)
    assert len(pairs) == count
    for left, right in pairs:
        assert opposite(left) == opposite(right)
        assert left in names
        assert right in names
    assert len({name for pair in pairs for name in pair}) == 2 * count
    assert not list(keypoint_warnings([{"name": "x", "keypoints": names}]))


def test_pairs_are_left_then_right():
    assert mirror_pairs(["R_Eye", "nose", "L_Eye"]) == [("L_Eye", "R_Eye")]
    assert mirror_pairs(["left_eye", "r_eye", "right_ear", "L_EAR"]) == [
        ("left_eye", "r_eye"),
        ("L_EAR", "right_ear"),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["tail", "tear"],
        ["lip", "lower_lip", "roof"],
        ["heel", "ear", "rear", "real"],
        ["bright", "cleft"],
        ["a_l_b", "a_r_b"],
    ],
)
def test_other_names_with_these_letters_are_no_pairs(names):
    assert mirror_pairs(names) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lsho", "rsho", "neck"], "'lsho', 'rsho'"),
        (["LFPaw", "RFPaw", "nose"], "'LFPaw', 'RFPaw'"),
        (["EYEL", "EYER"], "'EYEL', 'EYER'"),
        (["left_eye", "right_eye", "left_ear"], "'left_ear'"),
        ([f"left_{i}" for i in range(9)], "'left_5', ..."),
    ],
)
def test_names_that_look_paired(names, said):
    ((kind, text),) = keypoint_warnings([{"name": "x", "keypoints": names}])
    assert kind == "keypoint of one side"
    assert text.startswith(said) or f"{said} look" in text
