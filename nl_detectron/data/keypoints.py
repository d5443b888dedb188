"""Keypoint names and skeletons: which keypoints change sides when a picture is flipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nl_detectron.data.coco_format import Record

SKELETON_COLOR = (255, 255, 255)
_TOKEN = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of left_eye, eyeL, LShoulder, forelegR1
_SIDES = {"l": "left", "left": "left", "r": "right", "right": "right"}
_Side = tuple[str, str, str]  # of a name: left or right, what is before it, what is behind it


def keypoint_metadata(categories: Iterable[Record]) -> dict[str, Any]:
    """``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules`` of Detectron2's
    metadata; nothing if no category has keypoints, or if categories have different ones."""
    with_keypoints = _with_keypoints(categories)
    if not with_keypoints or _different_one(with_keypoints):
        return {}
    names, skeleton = with_keypoints[0]["keypoints"], with_keypoints[0].get("skeleton") or []
    limbs = [] if _wrong_limb(skeleton, len(names)) else skeleton
    rules = [(names[a - 1], names[b - 1], SKELETON_COLOR) for a, b in limbs]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": mirror_pairs(names),
        "keypoint_connection_rules": rules,
    }


def keypoint_warnings(categories: Iterable[Record]) -> Iterator[tuple[str, str]]:
    """The kind and the text of each thing that is wrong with the categories' keypoints."""
    with_keypoints = _with_keypoints(categories)
    if not with_keypoints:
        return
    first, names = with_keypoints[0], with_keypoints[0]["keypoints"]
    if wrong := _wrong_limb(first.get("skeleton") or [], len(names)):
        text = f"the skeleton has {wrong}, not a pair out of 1...{len(names)}: it is not drawn"
        yield "wrong skeleton", text
    if twice := [name for name in names if names.count(name) > 1]:
        yield "repeated keypoint", f"several keypoints have the name {twice[0]!r}"
    if alone := _without_partner(names):
        shown = ", ".join(map(repr, alone[:6])) + (", ..." if len(alone) > 6 else "")
        text = f"{shown} look like a left or right keypoint, but no pair was found: a flip does"
        yield "keypoint of one side", f"{text} not swap them (name them left_X and right_X)"
    if other := _different_one(with_keypoints):
        text = f"the categories {first['name']!r} and {other['name']!r} have different lists of"
        yield "different keypoints", f"{text} keypoints; Detectron2's keypoint head has one for all"


def _with_keypoints(categories: Iterable[Record]) -> list[Record]:
    return [category for category in categories if category.get("keypoints")]


def _different_one(categories: list[Record]) -> Record | None:
    """The first category whose keypoints are not those of the first."""
    names = categories[0]["keypoints"]
    return next((other for other in categories if other["keypoints"] != names), None)


def mirror_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of names that differ in their side alone: (left, right), in the order of the left
    ones.

    A side is "left" or "right" anywhere in a name, in small or capital letters; or the letter "l"
    or "r" as a word of its own at one end of it, as in ``l_eye``, ``eyeL``, ``LShoulder`` and
    ``forelegR1``, where numbers at the end do not count.
    """
    partners: dict[_Side, str] = {}
    for name in names:
        if side := _side(name):
            partners.setdefault(side, name)
    return [
        (name, partners["right", before, behind])
        for (side, before, behind), name in partners.items()
        if side == "left" and ("right", before, behind) in partners
    ]


def _side(name: str) -> _Side | None:
    if match := re.search("left|right", name, re.IGNORECASE):
        return _split(name, match)
    tokens = list(_TOKEN.finditer(name))
    while tokens and tokens[-1][0].isdigit():
        tokens.pop()
    for match in tokens[:1] + tokens[-1:]:
        if match[0].lower() in _SIDES:
            return _split(name, match)
    return None


def _split(name: str, match: re.Match[str]) -> _Side:
    before, behind = name[: match.start()], name[match.end() :]
    return _SIDES[match[0].lower()], before.strip().lower(), behind.strip().lower()


def _without_partner(names: Sequence[str]) -> list[str]:
    """Names with a side and no partner, and those that differ from another in an l or r alone."""
    paired = {name for pair in mirror_pairs(names) for name in pair}
    others = {name.lower(): name for name in names if name not in paired}
    alone = {name for name in others.values() if _side(name)}
    for name in others:
        for i in (i for i, letter in enumerate(name) if letter == "l"):
            if (partner := f"{name[:i]}r{name[i + 1 :]}") in others:
                alone |= {others[name], others[partner]}
    return [name for name in names if name in alone]


def _wrong_limb(skeleton: Any, num_keypoints: int) -> str | None:
    """The first limb that is no pair of keypoints, as text; such a skeleton is that of others."""
    if not isinstance(skeleton, list):
        return repr(skeleton)[:80]
    for limb in skeleton:
        is_pair = isinstance(limb, list) and len(limb) == 2 and {int}.issuperset(map(type, limb))
        if not is_pair or not all(1 <= i <= num_keypoints for i in limb):
            return repr(limb)[:80]
    return None
