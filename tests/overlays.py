"""Overlays of known place and strength, laid over pictures."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

KINDS = ("none", "opaque", "half", "faint", "logo", "tiled")
"""Opaque text with a rim, text at half and at 0.3 of its strength, a small logo in a corner, text
at 0.4 all over the picture."""
_TEXTS = ("STOCK CLIPS", "@wanderer", "CHANNEL 7", "footage.example")
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Layer:
    """A picture to lay over others of its size: colour (H, W, 3) and opacity (H, W), 0 to 1."""

    colour: np.ndarray
    opacity: np.ndarray

    def over(self, image: np.ndarray) -> np.ndarray:
        """The picture, BGR or grey uint8, under this layer."""
        colour, opacity = self.colour, self.opacity[..., None]
        if image.ndim == 2:
            colour, opacity = colour.mean(-1), self.opacity
        return np.rint(image * (1 - opacity) + colour * opacity).clip(0, 255).astype(np.uint8)


def layer(kind: str, height: int, width: int, key: str) -> Layer | None:
    """An overlay of one of `KINDS`; text, corner and colour follow from `key`. None for none."""
    random = np.random.default_rng(zlib.crc32(f"{key} {kind}".encode()))
    text = _TEXTS[int(random.integers(len(_TEXTS)))]
    scale = min(height, width) / 360
    if kind == "none":
        return None
    if kind == "logo":
        return _logo(height, width, round(40 * scale), random)
    if kind == "tiled":
        return _white(0.4 * _tiles(height, width, text, scale))
    size = 0.9 * scale
    (wide, high), base = cv2.getTextSize(text, _FONT, size, _thick(2 * scale))
    x, y = _corner(height, width, wide, high + base, random)
    ink = _written(height, width, text, (x, y + high), size, _thick(2 * scale))
    if kind == "opaque":
        around = max(2, round(2 * scale))
        rim = _written(height, width, text, (x, y + high), size, _thick(2 * scale) + around)
        return Layer(np.repeat(255 * ink[..., None], 3, -1), np.maximum(rim, ink))
    return _white({"half": 0.5, "faint": 0.3}[kind] * ink)


def composite(jpegs: Sequence[bytes], kind: str, key: str) -> list[bytes]:
    """Keyframes under an overlay, coded again."""
    images = [cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_COLOR) for j in jpegs]
    laid = layer(kind, *images[0].shape[:2], key)
    return list(jpegs) if laid is None else [jpeg_of(laid.over(i)) for i in images]


def jpeg_of(image: np.ndarray, quality: int = 90) -> bytes:
    """A picture as a keyframe is stored."""
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _thick(width: float) -> int:
    return max(1, round(width))


def _white(opacity: np.ndarray) -> Layer:
    return Layer(np.full((*opacity.shape, 3), 255.0), opacity)


def _corner(
    height: int, width: int, wide: int, high: int, random: np.random.Generator
) -> tuple[int, int]:
    """Upper left corner of a thing that lies near one of the picture's corners."""
    x, y = 0.03 * width, 0.04 * height
    right, below = random.random() < 0.5, random.random() < 0.5
    return (
        max(0, int(width - x - wide if right else x)),
        max(0, int(height - y - high if below else y)),
    )


def _written(
    height: int, width: int, text: str, at: tuple[int, int], size: float, thick: int
) -> np.ndarray:
    ink = np.zeros((height, width), np.uint8)
    cv2.putText(ink, text, at, _FONT, size, 255, thick, cv2.LINE_AA)
    return ink / 255


def _logo(height: int, width: int, side: int, random: np.random.Generator) -> Layer:
    """A white star on a coloured disc, nine tenths opaque."""
    x, y = _corner(height, width, side, side, random)
    middle = (x + side // 2, y + side // 2)
    disc, star = np.zeros((2, height, width), np.uint8)
    cv2.circle(disc, middle, side // 2, 255, -1, cv2.LINE_AA)
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = 0.45 * side * np.where(np.arange(10) % 2, 0.45, 1.0)
    points = np.stack([np.cos(angle), np.sin(angle)], -1) * reach[:, None] + middle
    cv2.fillPoly(star, [points.astype(np.int32)], 255, cv2.LINE_AA)
    white = star[..., None] / 255
    return Layer(random.uniform(0, 200, 3) * (1 - white) + 255 * white, 0.9 * disc / 255)


def _tiles(height: int, width: int, text: str, scale: float) -> np.ndarray:
    side = 2 * (height + width)
    ink = np.zeros((side, side), np.uint8)
    (wide, _), _ = cv2.getTextSize(text, _FONT, 0.6 * scale, 1)
    for row, y in enumerate(range(0, side, max(8, round(80 * scale)))):
        for x in range(-(row % 2) * wide, side, max(8, round(1.8 * wide))):
            cv2.putText(
                ink, text, (x, y), _FONT, 0.6 * scale, 255, _thick(1.5 * scale), cv2.LINE_AA
            )
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), 30, 1)
    ink = cv2.warpAffine(ink, turn, (side, side))
    top, left = side // 2 - height // 2, side // 2 - width // 2
    return ink[top : top + height, left : left + width] / 255
