"""What videos are measured in: VBench's sixteen dimensions, and ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["quality", "semantic", "other"]


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One number of a video, and how it comes about."""

    name: str
    """As VBench calls it."""
    title: str
    kind: Kind
    """The part of VBench's total score that it counts to."""
    unit: str
    """Of the raw score of a video."""
    scale: float = 1.0
    """score = raw score * scale: about 0 to 1, as VBench reports the mean."""
    implementations: tuple[str, ...] = ("vbench",)
    """`vbench` (the package), `native` (ours), or a `Metric` by module and class; the first is used
    unless another is asked for."""
    group: str
    """Dimensions that the package measures with the same models."""
    environment: Literal["here", "pinned", "detectron2"] = "here"
    """Where the package measures it: in this environment, in its own (`make vbench-env`), or in
    its own with detectron2 beside it."""
    frames: Literal["no", "ours", "mean"] = "no"
    """Scores of frames are stored: never; by our own implementation; or always, and the score of
    any part of a video is the mean of its frames'."""
    min_frames: int = 1
    """Of a video, below which there is no number."""
    is_custom: bool = True
    """It can be measured for any prompt: needs nothing that VBench's own prompts come with."""
    higher_is_better: bool = True
    about: str = ""
    """For a person: what it reads, and when it misleads."""

    def has_frame_scores(self, implementation: str) -> bool:
        """Whether that implementation gives a score to frames."""
        return self.frames == "mean" or (self.frames == "ours" and implementation == "native")


DIMENSIONS = {
    d.name: d
    for d in (
        Dimension(
            name="subject_consistency",
            title="Subject Consistency",
            kind="quality",
            unit="cosine",
            implementations=("native", "vbench"),
            frames="ours",
            group="dino",
            min_frames=2,
            about="DINO ViT-B/16: each frame against the one before and the first",
        ),
        Dimension(
            name="background_consistency",
            title="Background Consistency",
            kind="quality",
            unit="cosine",
            implementations=("native", "vbench"),
            frames="ours",
            group="clip_b",
            min_frames=2,
            about="CLIP ViT-B/32: each frame against the one before and the first",
        ),
        Dimension(
            name="temporal_flickering",
            title="Temporal Flickering",
            kind="quality",
            unit="1 - MAE/255",
            implementations=("native", "vbench"),
            frames="ours",
            group="flickering",
            min_frames=2,
            about="difference of neighbouring frames: of static scenes alone it tells of flicker",
        ),
        Dimension(
            name="motion_smoothness",
            title="Motion Smoothness",
            kind="quality",
            unit="1 - MAE/255",
            group="motion",
            min_frames=3,
            about="AMT-S: every other frame against its interpolation; static videos are smooth",
        ),
        Dimension(
            name="dynamic_degree",
            title="Dynamic Degree",
            kind="quality",
            unit="moves (0 or 1)",
            group="motion",
            min_frames=2,
            about="RAFT: whether enough of the picture moves, at eight frames a second",
        ),
        Dimension(
            name="aesthetic_quality",
            title="Aesthetic Quality",
            kind="quality",
            unit="LAION score / 10",
            implementations=("native", "vbench"),
            frames="mean",
            group="clip_l",
            about="LAION's linear predictor on CLIP ViT-L/14, mean over frames",
        ),
        Dimension(
            name="imaging_quality",
            title="Imaging Quality",
            kind="quality",
            unit="MUSIQ, 0 to 100",
            scale=0.01,
            frames="mean",
            group="musiq",
            about="MUSIQ trained on SPAQ, mean over frames: blur, noise, exposure",
        ),
        Dimension(
            name="object_class",
            title="Object Class",
            kind="semantic",
            unit="share of frames",
            group="grit_det",
            environment="detectron2",
            is_custom=False,
            about="GRiT: frames in which the object of the prompt is detected",
        ),
        Dimension(
            name="multiple_objects",
            title="Multiple Objects",
            kind="semantic",
            unit="share of frames",
            group="grit_det",
            environment="detectron2",
            is_custom=False,
            about="GRiT: frames in which both objects are detected",
        ),
        Dimension(
            name="human_action",
            title="Human Action",
            kind="semantic",
            unit="recognised (0 or 1)",
            group="umt",
            about="UMT: whether the action of the prompt is among the five likeliest of Kinetics",
        ),
        Dimension(
            name="color",
            title="Color",
            kind="semantic",
            unit="share of frames",
            group="grit_cap",
            environment="detectron2",
            is_custom=False,
            about="GRiT: frames with the object in its colour, of those with the object in any;"
            " a video in which it is never found is left out",
        ),
        Dimension(
            name="spatial_relationship",
            title="Spatial Relationship",
            kind="semantic",
            unit="score of frames",
            group="grit_det",
            environment="detectron2",
            is_custom=False,
            about="GRiT: whether the boxes lie as the prompt says; left is not told from right",
        ),
        Dimension(
            name="scene",
            title="Scene",
            kind="semantic",
            unit="share of frames",
            group="tag2text",
            environment="pinned",
            is_custom=False,
            about="Tag2Text: frames whose caption has all words of the scene",
        ),
        Dimension(
            name="appearance_style",
            title="Appearance Style",
            kind="semantic",
            unit="cosine",
            implementations=("native", "vbench"),
            frames="mean",
            group="clip_b",
            is_custom=False,
            about="CLIP ViT-B/32: each frame against the name of the style",
        ),
        Dimension(
            name="temporal_style",
            title="Temporal Style",
            kind="semantic",
            unit="cosine",
            group="viclip",
            about="ViCLIP: eight frames against the prompt",
        ),
        Dimension(
            name="overall_consistency",
            title="Overall Consistency",
            kind="semantic",
            unit="cosine",
            group="viclip",
            about="ViCLIP: eight frames against the prompt",
        ),
        Dimension(
            name="text_alignment",
            title="Text Alignment",
            kind="other",
            unit="cosine",
            implementations=("native",),
            frames="mean",
            group="clip_b",
            about="CLIP ViT-B/32: each frame against the prompt, mean (RISE-T2V, appendix)",
        ),
        Dimension(
            name="static",
            title="Static",
            kind="other",
            unit="static (0 or 1)",
            implementations=("evals.static:StaticFilter",),
            group="static",
            min_frames=2,
            about="VBench's static filter (RAFT): which videos temporal flickering is measured on",
        ),
    )
}
"""By name, in the order of VBench's leaderboard; the last two are not of its sixteen."""

VBENCH = tuple(d.name for d in DIMENSIONS.values() if d.kind != "other")
