"""Frames as VBench's readers give them, and what its image models are shown of them.

Shapes: F frames, H W lines and columns, C colours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from engine.video import DamagedError, check_complete, decode, open_video

if TYPE_CHECKING:
    import torch

SIDE_PX = 224
"""Of the square that CLIP sees, and the short side of what DINO sees."""
CLIP_COLOURS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of red, green and blue in what CLIP was trained on."""
DINO_COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

View = Literal["square", "wide", "picture"]
"""How frames are prepared for a model: see `prepare`."""

_TURNS = {
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}


def rgb_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Frames in the order in which they are shown, RGB uint8 (H, W, 3), turned upright.

    Of 8-bit H.264 and MPEG-4 they are decord's and OpenCV's to the bit. Where an edit list hides
    frames they are OpenCV's: decord shows the hidden ones too. Pixels that are not square stay so.

    Raises:
        VideoError: What is wrong with the file, be it after the last good frame.
        OSError: It cannot be read.
    """
    painter = VideoReformatter()
    first: tuple[int, ...] | None = None
    with open_video(path) as video:
        check_complete(video, path)
        for _, _, picture in decode(video):
            image = painter.reformat(picture, format="rgb24").to_ndarray()
            if turn := round(-picture.rotation / 90) * 90 % 360:
                image = cv2.rotate(image, _TURNS[turn])
            first = first or image.shape
            if image.shape != first:
                was, now = (f"{width}x{height}" for height, width, _ in (first, image.shape))
                raise DamagedError(f"frames change their size, from {was} to {now}")
            yield image
    if first is None:
        raise DamagedError("no frame could be decoded")


def chunks(images: Iterable[np.ndarray], most: int, most_pixels: int) -> Iterator[list[np.ndarray]]:
    """All of them, at most so many at once, and fewer if they are large."""
    held: list[np.ndarray] = []
    for image in images:
        held.append(image)
        if len(held) >= min(most, most_pixels // (image.shape[0] * image.shape[1])):
            yield held
            held = []
    if held:
        yield held


class Differences:
    """Mean absolute difference of neighbouring frames, in levels of 255, as VBench rounds it.

    Sums are of float32 in the order of memory, on which the last bits depend: VBench's frames are
    OpenCV's, whose colours are blue, green, red.
    """

    def __init__(self) -> None:
        self.values: list[np.float32] = []
        """One a frame, without the first."""
        self._before: np.ndarray | None = None
        self._space: np.ndarray | None = None

    def add(self, image_HWC: np.ndarray) -> None:
        """The next frame, RGB."""
        if self._before is not None:
            if self._space is None:
                self._space = np.empty(image_HWC.shape, np.float32)
            found = cv2.absdiff(self._before, image_HWC)
            np.copyto(self._space, cv2.cvtColor(found, cv2.COLOR_RGB2BGR))
            self.values.append(np.mean(self._space))
        self._before = image_HWC


def prepare(image_HWC: np.ndarray, views: Iterable[View]) -> dict[View, torch.Tensor]:
    """What VBench shows its models of a frame, float32 (C, H, W), made on the CPU.

    `square` is its `clip_transform` of a tensor: bicubic without antialiasing, the middle. `wide`
    is its `dino_transform`: bilinear without antialiasing, nothing cut off. These two are resampled
    line by line, in half of the time; the last bits differ (1e-4 of 255 levels). `picture` is its
    `clip_transform_Image`: Pillow's bicubic, which always averages, the middle.

    Args:
        image_HWC: RGB uint8.
        views: Which.
    """
    import torch

    found, views = {}, list(views)
    if "picture" in views:
        levels_HWC = torch.from_numpy(_pillow_square(image_HWC))
        found["picture"] = _coloured(levels_HWC.permute(2, 0, 1).contiguous().float(), "picture")
    if others := [view for view in views if view != "picture"]:
        levels_HWC = torch.from_numpy(image_HWC.astype(np.float32))
        for view in others:
            found[view] = _coloured(line_by_line(levels_HWC, view).contiguous(), view)
    return found


def prepare_on(
    device: torch.device, images: Sequence[np.ndarray], views: Iterable[View]
) -> dict[View, torch.Tensor]:
    """The same of frames of one size, (F, C, H, W), made on a device, as the package does it.

    Args:
        device: A GPU, mostly.
        images: RGB uint8 (H, W, 3).
        views: Which; `picture` is not made so.
    """
    import torch

    levels_FHWC = torch.from_numpy(np.stack(images)).to(device)
    levels_FCHW = levels_FHWC.permute(0, 3, 1, 2).float()
    return {view: _coloured(at_once(levels_FCHW, view), view) for view in views}


def _pillow_square(image_HWC: np.ndarray) -> np.ndarray:
    from PIL import Image
    from torchvision.transforms import InterpolationMode, functional

    resized = functional.resize(Image.fromarray(image_HWC), SIDE_PX, InterpolationMode.BICUBIC)
    return np.array(functional.center_crop(resized, [SIDE_PX, SIDE_PX]))


def at_once(frames_FCHW: torch.Tensor, view: View) -> torch.Tensor:
    """Frames of float32 resized for a view, with the package's own functions."""
    from torchvision.transforms import InterpolationMode, functional

    if view == "wide":
        return functional.resize(frames_FCHW, SIDE_PX, antialias=False)
    resized = functional.resize(frames_FCHW, SIDE_PX, InterpolationMode.BICUBIC, antialias=False)
    return functional.center_crop(resized, [SIDE_PX, SIDE_PX])


def line_by_line(image_HWC: torch.Tensor, view: View) -> torch.Tensor:
    """The same of one frame, (C, H, W): lines are weighted sums of lines, then columns of columns.

    What is cut off is not computed.
    """
    from torch.nn.functional import embedding_bag

    height, width, colours = image_HWC.shape
    rows, columns = _taps(height, width, view)
    lines = embedding_bag(
        rows.indices, image_HWC.view(height, -1), mode="sum", per_sample_weights=rows.weights
    )
    num = len(lines)
    turned = lines.view(num, width, colours)[:, columns.first : columns.end].transpose(0, 1)
    found = embedding_bag(
        columns.indices - columns.first,
        turned.reshape(len(turned), -1),
        mode="sum",
        per_sample_weights=columns.weights,
    )
    return found.view(len(found), num, colours).permute(2, 1, 0)


class _Taps(NamedTuple):
    """Lines (or columns) that each line of the result is made of."""

    indices: torch.Tensor
    """int64 (lines, taps)."""
    weights: torch.Tensor
    first: int
    """Lowest of the indices."""
    end: int
    """After the highest."""


@functools.lru_cache(maxsize=16)
def _taps(height: int, width: int, view: View) -> tuple[_Taps, _Taps]:
    """Of lines and of columns."""
    shorter, longer = sorted((height, width))
    long_px = int(SIDE_PX * longer / shorter)  # rounded down, as torchvision has it
    sizes = (SIDE_PX, long_px) if height <= width else (long_px, SIDE_PX)
    return _taps_of(height, sizes[0], view), _taps_of(width, sizes[1], view)


def _taps_of(before: int, after: int, view: View) -> _Taps:
    """The very weights of torch, from pictures of which one line is 1 and the others are 0."""
    import torch

    mode, num = ("bilinear", 2) if view == "wide" else ("bicubic", 4)
    one_each = torch.eye(before)[None, None]
    weights = torch.nn.functional.interpolate(one_each, size=(after, before), mode=mode)[0, 0]
    if view == "square":
        first = round((after - SIDE_PX) / 2)
        weights = weights[first : first + SIDE_PX]
    num = min(num, before)
    lowest = (weights != 0).int().argmax(1).clamp(max=before - num)
    indices = lowest[:, None] + torch.arange(num)
    return _Taps(indices, weights.gather(1, indices), int(indices.min()), int(indices.max()) + 1)


def _coloured(frames_FCHW: torch.Tensor, view: View) -> torch.Tensor:
    """From levels to what a model was trained on."""
    from torchvision.transforms import functional

    colours = DINO_COLOURS if view == "wide" else CLIP_COLOURS
    return functional.normalize(frames_FCHW.div(255.0), *colours, inplace=True)
