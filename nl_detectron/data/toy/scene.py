"""The pictures of the shapes datasets: sampling what is in one, and drawing it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from shapely.affinity import affine_transform
from shapely.geometry import LineString, Polygon, box
from shapely.geometry.base import BaseGeometry

Color = tuple[int, int, int]
Size = tuple[int, int]  # (height, width)

MIN_VISIBLE = 0.6  # of an object's area; what shows less is left out of the picture
SUPERSAMPLING = 4
NOTHING: BaseGeometry = Polygon()

# All of middling brightness, so that light and dark dots show on each.
COLORS = [
    (214, 69, 80),  # red
    (226, 124, 46),  # orange
    (188, 152, 36),  # yellow
    (84, 158, 74),  # green
    (38, 152, 150),  # teal
    (62, 122, 200),  # blue
    (134, 98, 196),  # violet
    (202, 92, 152),  # pink
]
LIGHT, DARK = (252, 250, 242), (20, 18, 24)


def _circle(radius: float, num_points: int, start: float = -90) -> list[tuple[float, float]]:
    """Points evenly around the origin; the first at `start` degrees (-90 is up)."""
    angles = [math.radians(start + 360 * i / num_points) for i in range(num_points)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


# Per class, for an object of radius 1: the outline, and the axis from head to tail.
SHAPES = {
    "ring": (Polygon(_circle(0.9, 48), [_circle(0.45, 32)]), LineString([(0, -0.67), (0, 0.67)])),
    "triangle": (Polygon(_circle(1.1, 3)), LineString([(0, -0.55), (0, 0.25)])),
    "square": (Polygon(_circle(1, 4, start=45)), LineString([(0, -0.42), (0, 0.42)])),
}


@dataclass(frozen=True)
class SceneObject:
    """An object, or a crowd of little ones, in a picture; geometries are in pixels."""

    class_name: str
    color: Color
    outline: BaseGeometry  # the whole of it, which may reach outside the picture
    axis: BaseGeometry | None  # from head to tail; a crowd has none
    mark_radius: float = 0.0
    nearer: BaseGeometry = NOTHING  # all objects in front of this one

    def visible(self, image: Polygon) -> BaseGeometry:
        """What shows in the picture, without slivers below a pixel, which would stretch its box."""
        visible = (self.outline & image) - self.nearer
        return visible.buffer(-0.5, join_style="mitre").buffer(0.5, join_style="mitre")


def _place(unit: BaseGeometry, radius: float, degrees: float, x: float, y: float) -> BaseGeometry:
    cos, sin = radius * math.cos(math.radians(degrees)), radius * math.sin(math.radians(degrees))
    return affine_transform(unit, [cos, -sin, sin, cos, x, y])


def _sample_center(rng: np.random.Generator, size: Size, margin: float) -> tuple[float, float]:
    """A point (x, y), at least `margin` of the picture's sides away from each border."""
    height, width = size
    x, y = rng.uniform(margin, 1 - margin, size=2) * (width, height)
    return x, y


def _sample_object(
    rng: np.random.Generator, center: tuple[float, float], radius: float, color: Color
) -> SceneObject:
    class_name = str(rng.choice(list(SHAPES)))
    degrees = rng.uniform(-60, 60)
    outline, axis = (_place(unit, radius, degrees, *center) for unit in SHAPES[class_name])
    return SceneObject(class_name, color, outline, axis, mark_radius=max(1.7, 0.15 * radius))


def _sample_crowd(
    rng: np.random.Generator, center: tuple[float, float], color: Color
) -> SceneObject:
    """A swarm of little shapes of one class, in three to five rows and columns."""
    class_name = str(rng.choice(list(SHAPES)))
    radius = rng.uniform(4, 6)
    rows, columns = rng.integers(3, 6, size=2)
    swarm = NOTHING
    for row, column in np.ndindex(rows, columns):
        offset = 2.3 * radius * np.array([column - (columns - 1) / 2, row - (rows - 1) / 2])
        x, y = center + offset + rng.uniform(-1, 1, size=2)
        swarm |= _place(SHAPES[class_name][0], radius, rng.uniform(0, 360), x, y)
    return SceneObject(class_name, color, swarm, axis=None)


def _propose_objects(rng: np.random.Generator, size: Size) -> Iterator[SceneObject]:
    """Objects from the nearest to the farthest: small before large, and a crowd behind all."""
    colors = [(r, g, b) for r, g, b in rng.permutation(COLORS).tolist()]
    radii = rng.uniform(16, 40, size=rng.integers(1, 5))
    background = rng.choice(["empty", "large object", "crowd"], p=[0.8, 0.1, 0.1])
    if background == "large object":
        radii = radii[:1]
    for radius in sorted(radii):
        yield _sample_object(rng, _sample_center(rng, size, margin=0.08), radius, colors.pop())
    if background == "large object":
        center = _sample_center(rng, size, margin=0.45)
        yield _sample_object(rng, center, rng.uniform(70, 84), colors.pop())
    elif background == "crowd":
        yield _sample_crowd(rng, _sample_center(rng, size, margin=0.2), colors.pop())


def sample_scene(rng: np.random.Generator, size: Size) -> list[SceneObject]:
    """The objects of one picture, at least one, the nearest first."""
    image = box(0, 0, *size[::-1])
    scene: list[SceneObject] = []
    nearer = NOTHING
    while not scene:
        for proposed in _propose_objects(rng, size):
            item = replace(proposed, nearer=nearer)
            if item.visible(image).area >= MIN_VISIBLE * item.outline.area:
                scene.append(item)
                nearer |= item.outline
    return scene


def cloudy_background(rng: np.random.Generator, size: Size) -> Image.Image:
    """A background for :func:`draw_scene`, dark or light."""
    brightness = rng.choice([rng.uniform(45, 85), rng.uniform(180, 215)])
    clouds = (brightness + rng.uniform(-22, 22, size=(4, 4, 3))).astype(np.uint8)
    height, width = size
    canvas_size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    return Image.fromarray(clouds).resize(canvas_size, Image.Resampling.BICUBIC)


def plain_background(color: Color, size: Size) -> Image.Image:
    """A background of one colour for :func:`draw_scene`."""
    height, width = size
    return Image.new("RGB", (width * SUPERSAMPLING, height * SUPERSAMPLING), color)


def draw_scene(
    rng: np.random.Generator, scene: list[SceneObject], background: Image.Image
) -> Image.Image:
    """Draw objects, the nearest first, on a background, which changes; smooth, with grain."""
    draw = ImageDraw.Draw(background)
    for item in reversed(scene):
        for polygon in hole_free_polygons(item.outline):
            points = SUPERSAMPLING * np.asarray(polygon.exterior.coords)
            draw.polygon(points.ravel().tolist(), fill=item.color)
        if item.axis is not None:
            for (x, y), mark in zip(item.axis.coords, (LIGHT, DARK)):
                r = item.mark_radius
                disc = SUPERSAMPLING * np.array([x - r, y - r, x + r, y + r])
                draw.ellipse(disc.tolist(), fill=mark)
    pixels = np.asarray(background.reduce(SUPERSAMPLING)).astype(np.int16)
    grain = rng.integers(-3, 4, size=pixels.shape)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def hole_free_polygons(geometry: BaseGeometry) -> list[Polygon]:
    """Cut a geometry into polygons without holes, which is all that COCO's lists of polygons hold.

    A polygon with holes is cut along a vertical line through one; vertical, because a rasteriser
    then gives each column of pixels to one side and leaves no seam.
    """
    polygons = []
    for part in getattr(geometry, "geoms", [geometry]):
        if not isinstance(part, Polygon) or part.is_empty:  # a line along a cut, or nothing
            continue
        if part.interiors:
            left, top, right, bottom = part.bounds
            cut = part.interiors[0].centroid.x
            for side in (box(left, top, cut, bottom), box(cut, top, right, bottom)):
                polygons += hole_free_polygons(part & side)
        else:
            polygons.append(part)
    return polygons
