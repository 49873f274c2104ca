"""The tables of a dataset, column by column: the one place that names them.

Column names carry their unit (`_s _px _fps _bytes _frac`), scores end in `_score`,
counts start with `num_`. What a run did not measure, and what does not apply, is null. Schema
changes are additive.
"""

from __future__ import annotations

import lance
import pyarrow as pa

FORMAT = 1
"""Layout of a dataset; raised when an older reader could misread it."""


def field(name: str, kind: pa.DataType, about: str, *, unit: str = "") -> pa.Field:
    """A column with its meaning (and unit) in the field's metadata."""
    return pa.field(name, kind, metadata={"about": about} | ({"unit": unit} if unit else {}))


_text, _float, _real = pa.string(), pa.float32(), pa.float64()
EMBEDDING = pa.list_(pa.float32(), 768)
"""As wide as CLIP ViT-L/14's, which is the one that the aesthetic predictor reads."""

VERDICT = pa.schema(
    [
        field("state", _text, "kept, rejected, failed, duplicate or pending"),
        field("kept", pa.bool_(), "state is kept"),
        field("stage", _text, "stage that rejected or failed it"),
        field("reason", _text, 'why it is not kept, e.g. "brightness<0.2"'),
        field("rule_column", _text, "column that the rejecting rule read"),
        field("rule_value", _real, "value that the rule found"),
        field("rule_bound", _real, "bound that the value crossed"),
        field("duplicate_of", _text, "id of the kept one that stands for it"),
    ]
)
"""What `engine.judge` decides; rewritten whenever rules change, in one commit."""

ERRORS = pa.schema(
    [
        field("error_operator", _text, "operator that failed; null is the scan"),
        field("error_type", _text, "exception class of a failed measurement"),
        field("error", _text, "what was wrong, for a person"),
        field("error_transient", pa.bool_(), "it may pass: the next run tries again"),
    ]
)
"""Why a row lacks values; the first failure stands, and nothing is measured after it."""

SOURCES = pa.schema(
    [
        field("source_id", _text, "uuid5 of the uri"),
        field("uri", _text, "absolute path or object-store URI"),
        field("media", _text, "video or image; null in datasets from before images is video"),
        field("state", _text, "done, failed or duplicate"),
        field("error_type", _text, "exception class of a failure"),
        field("error", _text, "what was wrong, for a person"),
        field("transient", pa.bool_(), "the failure may pass: the next run tries again"),
        field("duplicate_of", _text, "source_id of the source with the same content"),
        field("missing", pa.bool_(), "the file was gone when the last run looked"),
        field("size_bytes", pa.int64(), "size when it was read", unit="bytes"),
        field("mtime_ns", pa.int64(), "time stamp when it was read", unit="ns"),
        field("etag", _text, "object store's ETag when it was read"),
        field("sha256", _text, "content hash"),
        field("request", _text, "hash of the spans asked for"),
        field("beside", _text, "hash of captions and extra columns found beside the file"),
        field("fingerprint", _text, "of the scan that read it"),
        field("scanned", pa.bool_(), "frames were decoded (false: its container decided)"),
        field("container", _text, "container format"),
        field("codec", _text, "video codec"),
        field("pix_fmt", _text, "pixel format as coded"),
        field("width_px", pa.int32(), "as shown: rotated, square pixels", unit="px"),
        field("height_px", pa.int32(), "as shown: rotated, square pixels", unit="px"),
        field("rotation_deg", pa.int32(), "clockwise turn that a player applies", unit="degrees"),
        field("fps", _real, "average frame rate", unit="frames/s"),
        field("duration_s", _real, "as decoded, else as the container claims", unit="s"),
        field("num_frames", pa.int64(), "as decoded, else as the container claims"),
        field("has_audio", pa.bool_(), "there is an audio stream"),
        field("num_clips", pa.int32(), "clips it was split into"),
        field("frames_decoded", pa.int64(), "frames the decoder gave for it"),
        field("note", _text, "a fallback that reading it took"),
        field("caption", _text, "caption found beside the file"),
        field("extra", _text, "manifest columns of its own, as one JSON object"),
        field("run_id", _text, "run that wrote this row"),
    ]
)

CLIPS = pa.schema(
    [
        field("clip_id", _text, "uuid5 of content hash and span"),
        field("source_id", _text, "source it is a span of"),
        field("source_uri", _text, "where that source was"),
        field("media", _text, "video or image; null is video"),
        field("start_s", _real, "first frame's time", unit="s"),
        field("end_s", _real, "end of the last frame's time", unit="s"),
        field("start_frame", pa.int64(), "index of the first frame in the source"),
        field("num_frames", pa.int64(), "frames in the clip"),
        field("fps", _real, "average frame rate", unit="frames/s"),
        field("width_px", pa.int32(), "as shown", unit="px"),
        field("height_px", pa.int32(), "as shown", unit="px"),
        field("duration_s", _real, "end_s - start_s", unit="s"),
        field("aspect_ratio", _real, "shown width / shown height"),
        field("codec", _text, "video codec of the source"),
        field("motion_score", _float, "mean optical flow at the stated width", unit="px/frame"),
        field("black_area_frac", _float, "share of black pixels, mean over frames"),
        field("brightness", _float, "mean luma, 0 to 1"),
        field("black_frame_frac", _float, "share of black frames"),
        field("clip_embedding", EMBEDDING, "mean of the keyframes' unit-length CLIP embeddings"),
        field("clip_model", _text, "CLIP model of the embedding and of clip_score"),
        field("aesthetic_score", _float, "LAION aesthetic predictor, 1 to 10, mean over keyframes"),
        field("ocr_area_frac", _float, "share of the frame under text, mean over keyframes"),
        field("watermark_score", _float, "P(yes) / (P(yes) + P(no)) of a watermark, by a VLM"),
        field("overlay_score", _float, "static overlay, without weights, 0 to 1"),
        field("residual_cut_score", _float, "evidence of a cut inside the clip, 0 to 1"),
        field("phash", pa.uint64(), "perceptual hash of the keyframe in the middle"),
        field("phashes", pa.list_(pa.uint64()), "perceptual hash of each keyframe"),
        field("caption", _text, "generated caption, cleaned"),
        field("caption_raw", _text, "what the captioner said, word for word"),
        field("caption_original", _text, "caption found beside the input"),
        field("caption_fault", _text, "empty, refusal, wrong_language, prompt_echo; '' is none"),
        field("repetition_2gram", _float, "2-gram repetition rate of the caption"),
        field("repetition_5gram", _float, "5-gram repetition rate of the caption"),
        field("repetition_10gram", _float, "10-gram repetition rate of the caption"),
        field("clip_score", _float, "CLIP similarity of caption and keyframes"),
        field("extra", _text, "manifest columns of its own, as one JSON object"),
        *ERRORS,
        *VERDICT,
    ]
)

PAIRS = pa.schema(
    [
        field("pair_id", _text, "uuid5 of clip_id, instruction and language"),
        field("clip_id", _text, "clip (or image) that it describes: x0"),
        field("source_id", _text, "source of that clip"),
        field("source_uri", _text, "where that source was"),
        field("media", _text, "video or image"),
        field("start_s", _real, "first frame's time", unit="s"),
        field("end_s", _real, "end of the last frame's time", unit="s"),
        field("instruction", _text, "dense, multi_scene or multilingual"),
        field("instruction_text", _text, "y_inst: the instruction with its slots open"),
        field("language", _text, "language of the original, where the instruction names it"),
        field("original", _text, "y_ori: short caption"),
        field("original_source", _text, "given (found beside the input) or generated"),
        field("rephrased", _text, "y_rephrase, cleaned"),
        field("rephrased_raw", _text, "what the captioner said, word for word"),
        field("caption_fault", _text, "of y_rephrase: refusal, wrong_scenes …; '' is none"),
        field("repetition_2gram", _float, "2-gram repetition rate of y_rephrase"),
        field("repetition_5gram", _float, "5-gram repetition rate of y_rephrase"),
        field("repetition_10gram", _float, "10-gram repetition rate of y_rephrase"),
        field("clip_score", _float, "CLIP similarity of y_rephrase and keyframes"),
        *ERRORS,
        *VERDICT,
    ]
)

KEYFRAMES = pa.schema(
    [
        field("clip_id", _text, "clip it shows"),
        field("source_id", _text, "source it was taken from"),
        field("frame", pa.int64(), "index of the frame in the source"),
        field("time_s", _real, "time of the frame in the source", unit="s"),
        field("width_px", pa.int32(), "upright, square pixels", unit="px"),
        field("height_px", pa.int32(), "upright, square pixels", unit="px"),
        lance.blob_field("jpeg"),
    ]
)

CUTS = pa.schema(
    [
        field("clip_id", _text, "clip that was cut out of its source"),
        field("source_id", _text, "source of that clip"),
        field("mode", _text, "copy or encode"),
        field("start_s", _real, "first frame's time in the source, as cut", unit="s"),
        field("end_s", _real, "end of the last frame's time in the source, as cut", unit="s"),
        field("num_frames", pa.int64(), "frames in the cut"),
        field("width_px", pa.int32(), "as shown", unit="px"),
        field("height_px", pa.int32(), "as shown", unit="px"),
        field("size_bytes", pa.int64(), "of the file", unit="bytes"),
        field("path", _text, "file, relative to the dataset's root; null where mp4 holds it"),
        lance.blob_field("mp4"),
        field("error_type", _text, "exception class of a failure"),
        field("error", _text, "what was wrong, for a person"),
        field("run_id", _text, "run that wrote this row"),
    ]
)

FEATURES = pa.schema(
    [
        field("feature_id", _text, "uuid5 of subject_id, kind, place and fingerprint"),
        field("subject_id", _text, "clip_id or pair_id that it was computed from"),
        field("clip_id", _text, "clip that it is of: they are forgotten together"),
        field("kind", _text, "what it is: latents, tokens, states …"),
        field("place", _text, "of frames: bucket, frame rate and variant; of texts: their hash"),
        field("fingerprint", _text, "of the encoder and of those before it"),
        field("dtype", _text, "of the tensor, as torch names it: float32, bfloat16, int32 …"),
        field("shape", pa.list_(pa.int32()), "of the tensor"),
        field("data", pa.large_binary(), "the tensor's bytes, row-major, little-endian"),
        field("error_type", _text, "exception class of a failure"),
        field("error", _text, "what was wrong, for a person"),
        field("error_transient", pa.bool_(), "it may pass: the next run tries again"),
        field("run_id", _text, "run that wrote this row"),
    ]
)

GENERATIONS = pa.schema(
    [
        field("generation_id", _text, "uuid5 of model, checkpoint, text, seed and settings"),
        field("model", _text, "name that its user gave the model"),
        field("model_kind", _text, "export, diffusers, served or folder"),
        field("checkpoint", _text, "fingerprint of the weights; null for videos made elsewhere"),
        field("prompt", _text, "short prompt: what text metrics read"),
        field("text", _text, "what the model was given: an enhanced prompt, or the prompt"),
        field("sample", pa.int32(), "number among the videos of this prompt, from 0"),
        field("seed", pa.int64(), "of the noise; null where it is not known"),
        field("settings", _text, "steps, guidance, size …, as JSON"),
        field("num_frames", pa.int64(), "frames in the video"),
        field("fps", _real, "frame rate", unit="frames/s"),
        field("width_px", pa.int32(), "as shown", unit="px"),
        field("height_px", pa.int32(), "as shown", unit="px"),
        field("duration_s", _real, "num_frames / fps", unit="s"),
        field("size_bytes", pa.int64(), "of the file", unit="bytes"),
        field("sha256", _text, "of the file"),
        field("rephrased", _text, "what the model's own LLM made of the text"),
        field("notes", _text, "what did not go as asked, as a JSON list"),
        field("timings", _text, "seconds of what was done, as JSON"),
        field("source_uri", _text, "file it was imported from; null where it was made here"),
        lance.blob_field("mp4"),
        field("error_type", _text, "exception class of a failure"),
        field("error", _text, "what was wrong, for a person"),
        field("error_transient", pa.bool_(), "it may pass: the next run tries again"),
        field("created_at", pa.timestamp("us", "UTC"), "when it was stored"),
        field("run_id", _text, "run that wrote this row"),
    ]
)

SCORES = pa.schema(
    [
        field("score_id", _text, "uuid5 of video, dimension, segment, prompt and fingerprint"),
        field("generation_id", _text, "video that it is of"),
        field("model", _text, "model of that video"),
        field("prompt", _text, "short prompt of that video"),
        field("sample", pa.int32(), "number among the videos of this prompt, from 0"),
        field("video_sha256", _text, "of the file that was measured"),
        field("dimension", _text, "what was measured"),
        field("segment", _text, "frames START:STOP of the video; null is all"),
        field("implementation", _text, "vbench (the package) or native"),
        field("score", _real, "raw_score on VBench's scale, about 0 to 1"),
        field("raw_score", _real, "in the dimension's own unit"),
        field("raw_unit", _text, "that unit"),
        field("normalised_score", _real, "between the leaderboard's bounds of the dimension"),
        field("constants", _text, "version of those bounds"),
        field("frame_scores", pa.list_(_real), "raw, one a frame; null for a frame without one"),
        field("num_frames", pa.int64(), "frames that were measured"),
        field("details", _text, "as JSON: what merging videos needs, as the package gives it"),
        field("fingerprint", _text, "of the metric: weights, versions, parameters"),
        field("vbench_version", _text, "of the package; null where it had no part"),
        field("weights", _text, "hash of each file of weights, as JSON"),
        field("environment", _text, "versions of libraries, device and precision, as JSON"),
        field("seconds", _real, "that measuring took, its share of what is shared", unit="s"),
        field("error_type", _text, "exception class of a failure"),
        field("error", _text, "what was wrong, for a person"),
        field("error_transient", pa.bool_(), "it may pass: the next run tries again"),
        field("created_at", pa.timestamp("us", "UTC"), "when it was stored"),
        field("run_id", _text, "run that wrote this row"),
    ]
)

RUNS = pa.schema(
    [
        field("run_id", _text, "uuid of the run"),
        field("recipe", _text, "name of the recipe"),
        field("resolved", _text, "the whole recipe, as JSON"),
        field("fingerprint", _text, "of the scan"),
        field("operators", _text, "rows, batches and seconds of each operator, as JSON"),
        field("versions", _text, "library versions, as JSON"),
        field("git_commit", _text, "commit of this project, where known"),
        field("src", _text, "what was asked for, as JSON"),
        field("started_at", pa.timestamp("us", "UTC"), "start"),
        field("seconds", _real, "wall time", unit="s"),
        field("frames_decoded", pa.int64(), "frames decoded by this run"),
        field("interrupted", pa.bool_(), "stopped before the end"),
        field("counts", _text, "sources, clips and reasons at the end, as JSON"),
        field("night", _text, "date of a nightly evaluation, YYYY-MM-DD; null for others"),
    ]
)

TRAIN_METRICS = pa.schema(
    [
        field("run", _text, "folder of the training run"),
        field("stage", _text, "stage that was trained"),
        field("step", pa.int64(), "from 0"),
        field("figures", _text, "what was logged, as JSON: loss, learning rate, samples/s …"),
        field("loss", _real, "of the step, mean over its batch"),
    ]
)
"""A Lance table of its own in the folder of a training run, `train_metrics.lance`.

`step` and `loss` are in `figures`, too: here they are for those who query.
"""

VOTES = pa.schema(
    [
        pa.field(
            "vote_id",
            _text,
            nullable=False,
            metadata={
                "about": "uuid5 of study, item, question and voter",
                "lance-schema:unenforced-primary-key": "true",
            },
        ),
        field("study", _text, "fingerprint of the study: its videos, questions and seed"),
        field("item_id", _text, "which videos were shown together"),
        field("prompt", _text, "that they were made of"),
        field("question", _text, "which of the study's questions"),
        field("voter_id", _text, "hash of the code that the voter came with"),
        field("shown", pa.list_(_text), "models, in the order in which their videos were shown"),
        field("chosen", pa.list_(_text), "models of the videos that were chosen"),
        field("seconds", _real, "from the first sight of the item to the vote", unit="s"),
        field("created_at", pa.timestamp("us", "UTC"), "when it was stored"),
    ]
)
"""A Lance table of its own, at the path given by `--votes`: all that a page writes to.

`seconds` and `created_at` are for those who query, to tell voters who did not look.
"""

GIVEN = ("caption_original",)
"""Columns of clips that a source may come without: what reads them does not apply then."""

TABLES: dict[str, pa.Schema] = {
    "sources": SOURCES,
    "clips": CLIPS,
    "keyframes": KEYFRAMES,
    "pairs": PAIRS,
    "cuts": CUTS,
    "features": FEATURES,
    "generations": GENERATIONS,
    "scores": SCORES,
    "runs": RUNS,
}
