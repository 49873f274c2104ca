"""Rows that the papers print, as cells that stand beside ours.

Facts with their source; the conditions (prompts, seeds, length and size of videos) are the papers'
own. Numbers are as printed. A cell that the text at hand does not give for certain is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from evals.presets import preset_named
from evals.results import Cell

MISSING = "–"

_PRINTED: Mapping[str, Mapping[str, str]] = {
    "mimir_1": {
        "ModelscopeT2V": "92.00 37.14 55.85 31.17 1.52 63.20 8.26 14.52",
        "OpenSora": "97.20 58.57 63.38 90.79 64.81 84.67 76.63 25.51",
        "OpenSoraPlan": "97.50 59.40 57.79 67.39 26.98 83.38 38.69 21.86",
        "CogVideoX-2B": "94.71 60.27 60.52 84.86 65.70 86.21 70.49 25.10",
        "CogVideoX-5B": "95.60 60.62 61.35 87.82 65.70 84.17 64.86 25.86",
        "Mimir": "97.68 62.92 63.91 92.87 85.29 86.50 78.67 26.22",
    },
    "mimir_3": {
        "Baseline": "95.60 60.62 61.35 87.82 65.70 84.17 64.86 25.86",
        "B+Decoder-only": "94.66 36.38 60.10 4.97 0.00 37.50 2.36 3.66",
        "B+Decoder-only+Norm": "97.12 61.68 62.52 85.50 65.24 84.85 59.28 25.26",
        "B+Decoder-only+Norm+SS": "96.48 58.11 62.49 87.18 68.83 85.21 67.86 24.33",
        "B+Decoder-only+ZeroConv": "97.20 61.21 62.99 92.03 84.98 86.21 69.17 25.03",
        "B+Decoder-only+ZeroConv+SS": "97.33 62.14 63.02 91.21 84.47 86.43 70.16 23.68",
        "Mimir": "97.68 62.92 63.91 92.87 85.29 86.50 78.67 26.22",
    },
    "semanticgen_1": {
        "Hunyuan-Video": "91.11 95.32 97.49 99.07 64.23 62.60",
        "Wan2.1-T2V-14B": "97.23 98.28 98.35 99.08 66.63 65.61",
        "Base-CT": "96.17 97.27 98.07 99.07 65.77 63.97",
        "SemanticGen": "97.79 97.68 98.47 99.17 65.23 64.60",
    },
    "semanticgen_2": {
        "SkyReels-V2": "93.13 95.11 98.41 99.24 66.00 62.17 9.00",
        "Self-Forcing": "90.41 93.42 98.51 99.17 70.23 62.73 12.39",
        "LongLive": "94.77 95.90 98.48 99.21 70.17 64.73 4.08",
        "Base-CT-Swin": "94.01 94.84 98.64 99.32 68.15 61.66 5.20",
        "SemanticGen": "95.07 96.70 98.31 99.55 70.47 64.09 3.58",
    },
    "semanticgen_3": {
        "w.o. compression (dim=2048)": "96.29 96.54 96.39 99.31 67.42 58.88",
        "w. compression (dim=64)": "97.36 96.85 98.23 98.34 68.16 60.62",
        "w. compression (dim=8)": "97.49 97.34 98.27 99.38 68.43 60.95",
    },
    "rise_2": {
        "AnimateDiff": "6.39 0.983 31.36",
        "AnimateDiff, dense prompt": "6.54 0.981 32.69",
        "RISE-AnimateDiff": "6.61 0.984 31.95",
    },
    "rise_3": {
        "Pika": "6.11 0.996 29.65",
        "Gen2": "6.45 0.995 31.35",
        "ModelScope": "4.94 0.967 31.61",
        "Latte": "5.60 0.970 32.07",
        "VideoCrafter2": "6.00 0.984 31.86",
        "CogVideoX-2B": "5.40 0.983 30.12",
        "AnimateDiff": "6.39 0.983 31.36",
        "RISE-AnimateDiff": "6.61 0.984 31.95",
    },
    "rise_5": {
        "AnimateDiff, 2D anime": "7.04 0.986 28.44",
        "RISE-AnimateDiff, 2D anime": "– – 30.13",
        "AnimateDiff, 3D cartoon": "6.70 0.984 31.33",
        "RISE-AnimateDiff, 3D cartoon": "– – –",
        "CogVideoX": "5.40 0.983 30.12",
        "RISE-CogVideoX": "5.43 – 33.33",
    },
    "rise_6": {
        "AnimateDiff": "6.39 0.983 31.36",
        "AnimateDiff, fine-tuned": "5.93 0.970 30.50",
        "RISE-AnimateDiff": "6.61 0.984 31.95",
    },
    "rise_7": {
        "AnimateDiff": "6.39 0.983 0.083 31.36",
        "RISE-T2V (LLaMA2)": "6.61 0.984 0.273 31.95",
        "RISE-T2V (ChatGLM3)": "6.72 0.985 0.151 30.90",
    },
}
"""By preset and model, in the order of the preset's columns, without the percent sign."""

UNREADABLE = "left out: the copy of the paper at hand does not give this number for certain"


def published(preset_name: str) -> list[Cell]:
    """What the paper prints in that table; empty where it prints no numbers (`rise_figure4`).

    Raises:
        ValueError: There is no such preset.
    """
    preset = preset_named(preset_name)
    cells = []
    for model, numbers in _PRINTED.get(preset_name, {}).items():
        for column, number in zip(preset.columns, numbers.split(), strict=True):
            missing = number == MISSING
            cells.append(
                Cell(
                    model=model,
                    column=column.dimension,
                    category=None,
                    value=None if missing else float(Decimal(number) / column.multiplier),
                    stderr=None,
                    num_videos=0,
                    num_prompts=0,
                    num_expected=0,
                    num_failed=0,
                    published=preset.source,
                    notes=(UNREADABLE,) if missing else (),
                )
            )
    return cells
