"""A small Tag2Text for VBench's `scene`: what it says means nothing, and depends on the frame.

Its sizes lie in the package's code and in files beside it; `shrink` gives others while it is built.
Only VBench's own environment can build it, so its checkpoint holds no tensors but the seed that
they are drawn from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKPOINT = Path("caption_model", "tag2text_swin_14m.pth")
TEXT = Path("bert-base-uncased")
WORDS = (
    "alley beach bridge castle cave church city desert farm forest garden harbor house kitchen lake"
    " mountain ocean park restaurant river road room sea sky street tower valley village water"
).split()
"""What captions are made of."""
_OTHERS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "|")
_NUM_TOKENS = 30522
"""As BERT has them: GRiT takes it for granted."""
_SIZE = 48
_SEED = 7


def make_scene_weights(cache: Path) -> Path:
    """Writes what `scene` needs into a cache marked as tiny, and gives the cache.

    Source: vbench 0.1.5, `third_party/tag2Text/tag2text.py`: BERT's checkpoint may be empty, since
    Tag2Text's own is loaded after it.
    """
    import torch

    named = [*_OTHERS, *WORDS]
    tokens = [*named, *(f"[unused{n}]" for n in range(_NUM_TOKENS - len(named)))]
    for folder in (CHECKPOINT.parent, TEXT):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    (cache / TEXT / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    torch.save({}, cache / TEXT / "pytorch_model.bin")
    torch.save({"model": {}, "seed": _SEED}, cache / CHECKPOINT)
    return cache


@contextlib.contextmanager
def shrink() -> Iterator[None]:
    """While it lasts, `tag2text_caption` builds a model of `make_scene_weights`."""
    from vbench.third_party.tag2Text import tag2text

    class Config(tag2text.BertConfig):
        @classmethod
        def from_json_file(cls, path: str) -> Config:
            config = super().from_json_file(path)
            config.update(
                {
                    "hidden_size": _SIZE,
                    "intermediate_size": 2 * _SIZE,
                    "num_attention_heads": 1,
                    "num_hidden_layers": 1,
                }
            )
            return config

        def __setattr__(self, name: str, value: Any) -> None:
            # Tag2Text's code sets the width of the tags that captions are made from: 768.
            is_fixed = name == "encoder_width" and value == 768
            super().__setattr__(name, _SIZE if is_fixed else value)

    class Linear(tag2text.GroupWiseLinear):
        def __init__(self, num_classes: int, _: int, *, bias: bool = True):
            super().__init__(num_classes, _SIZE, bias)

    small = {
        "BertConfig": Config,
        "GroupWiseLinear": Linear,
        "read_json": lambda path: tag2text_json(path) | _SWIN,
        "load_checkpoint_swinbase": _drawn,
    }
    tag2text_json = tag2text.read_json
    own = {name: getattr(tag2text, name) for name in small}
    vars(tag2text).update(small)
    try:
        yield
    finally:
        vars(tag2text).update(own)


_SWIN = {
    "embed_dim": 16,
    "vision_width": 128,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 1, 1],
}


def _drawn(model: Any, path: str, _: object) -> tuple[Any, None]:
    """The model with the weights that the seed of its checkpoint stands for."""
    import torch

    generator = torch.Generator().manual_seed(torch.load(path, weights_only=True)["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                width = parameter[0].numel() ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width)
            else:
                parameter.fill_(float(name.endswith("weight")))
        first = model.tokenizer.convert_tokens_to_ids(WORDS[0])
        bias = model.text_decoder.cls.predictions.bias
        bias[:first] = bias[first + len(WORDS) :] = -1e4
        bias[model.tokenizer.sep_token_id] = 0
    return model, None
