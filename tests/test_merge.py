"""VBench's single-process formulas, worked by hand."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest

from evals.dimensions import VBENCH
from evals.merge import merge


def rows(*values, **lists):
    others = [dict(zip(lists, more, strict=True)) for more in zip(*lists.values(), strict=True)]
    return [
        {"video_results": value} | (others[i] if others else {}) for i, value in enumerate(values)
    ]


@pytest.mark.parametrize("dimension", [*VBENCH, "text_alignment"])
def test_nothing_merges_to_nothing(dimension):
    assert merge(dimension, []) is None


def test_consistencies_count_frames_not_videos():
    """Two videos of 2 and 5 frames: one and four pairs of neighbours."""
    subject = rows(1.0, 0.5, num_frames=[2, 5])
    assert merge("subject_consistency", subject) == (1.0 + 4 * 0.5) / 5 == 0.6
    assert merge("subject_consistency", subject) != 0.75  # of several GPUs: the mean of videos
    background = rows(1.0, 0.5, video_sim=[1.0, 2.0], cnt_per_video=[1, 4])
    assert merge("background_consistency", background) == 0.6


def test_a_subjects_own_sum_is_taken_where_it_is_known():
    """The quotient by the frames does not come back: 0.1 * 3 / 3 * 3 is not 0.1 * 3."""
    total = functools.reduce(operator.add, [0.7, 0.9, 0.95, 0.3, 0.11, 0.4, 0.5], 0.0)
    for num in range(2, 200):
        mean = total / (num - 1)
        if mean * (num - 1) != total:
            break
    known = rows(mean, 0.5, num_frames=[num, 2], video_sim=[total, 0.5])
    assert merge("subject_consistency", known) == (total + 0.5) / num
    unknown = rows(mean, 0.5, num_frames=[num, 2])
    assert merge("subject_consistency", unknown) == pytest.approx((total + 0.5) / num, abs=1e-12)


def test_styles_count_frames_not_videos_nor_last_frames():
    found = rows(0.25, 0.4, frame_results=[[0.2, 0.3], [0.4]], cur_sim=[0.3, 0.4])
    assert merge("appearance_style", found) == (0.2 + 0.3 + 0.4) / 3
    assert merge("appearance_style", found) != pytest.approx((0.3 + 0.4) / 2)  # of several GPUs


def test_the_order_of_a_sum_is_the_suites():
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in the last bit."""
    forward, back = rows(0.1, 0.2, 0.3), rows(0.3, 0.2, 0.1)
    assert merge("aesthetic_quality", forward) == (0.1 + 0.2 + 0.3) / 3
    assert merge("aesthetic_quality", back) == (0.3 + 0.2 + 0.1) / 3
    assert merge("aesthetic_quality", forward) != merge("aesthetic_quality", back)


def test_imaging_comes_to_one():
    assert merge("imaging_quality", rows(40.0, 70.0)) == 0.55


@pytest.mark.parametrize("dimension", ["object_class", "multiple_objects", "scene"])
def test_detections_count_frames(dimension):
    found = rows(0.75, 0.0, success_frame_count=[12, 0], frame_count=[16, 4])
    assert merge(dimension, found) == 12 / 20


def test_relations_count_frames():
    found = rows(0.5, 1.0, frame_results=[[0, 1], [1, 1, 1, 0.2]])
    assert merge("spatial_relationship", found) == pytest.approx(4.2 / 6, abs=1e-15)


def test_colours_leave_out_videos_without_the_object():
    found = rows(1.0, None, 0.5)
    assert merge("color", found) == 0.75
    assert merge("color", rows(None, None)) is None


def test_yes_and_no_become_shares():
    assert merge("dynamic_degree", rows(True, False, True, True)) == 0.75
    actions = rows(True, False, False, cor_num_per_video=[1, 0, 0])
    assert merge("human_action", actions) == 1 / 3


REST = "temporal_flickering motion_smoothness temporal_style overall_consistency text_alignment"


@pytest.mark.parametrize("dimension", REST.split())
def test_the_rest_is_numpys_mean(dimension):
    """Which adds in pairs: over many videos its last bits are not those of one after another."""
    values = np.random.default_rng(0).uniform(0.2, 1, 1000).tolist()
    assert merge(dimension, rows(*values)) == float(np.mean(values))
    assert float(np.mean(values)) != functools.reduce(operator.add, values) / 1000
    assert type(merge(dimension, rows(*values))) is float
