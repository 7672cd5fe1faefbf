"""Small random models of many architectures, each with a batch that gives a loss: text, text to text, vision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

IDS = torch.arange(2 * 6).reshape(2, 6) * 7 % 31
LABELS = torch.tensor([[5, 9, 2, 1], [8, 3, 3, 0]])
CLASSES = torch.tensor([1, 4])
IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).mul(3).sin()
SOUND = torch.linspace(-2, 2, 2 * 8 * 16).reshape(2, 8, 16).mul(3).sin()


SHARED = ("shared",)
"""The embedding that encoder's and decoder's hold the weight of, and that is itself never called."""
GROUPS = r"groups=|size mismatch"
"""Ours has a pair for each group of a convolution, which can be merged; PEFT has no such shapes."""


class Convolutions(nn.Module):
    """Dilated, grouped, strided and circular convolutions and a head; [batch, 3, 32, 32] to a loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(12, 12, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(12, 18, (3, 5), groups=3, stride=2)
        self.depthwise = nn.Conv2d(18, 18, 3, groups=18, padding=1, padding_mode="circular")
        self.line = nn.Conv1d(18, 12, 4, stride=3)
        self.head = nn.Linear(12, 5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Convolve, mean over places, classify."""
        x = pixel_values
        for layer in (self.stem, self.dilated, self.grouped, self.depthwise):
            x = functional.gelu(layer(x))
        logits = self.head(functional.gelu(self.line(x.flatten(2))).mean(-1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Architecture:
    """How to build a model, and its batch.

    Args:
        uncalled: patterns of layers whose weight is read past their forward, so that no hook sees them.
        all_linear: it has linear layers beside its head.
        peft_fails: what PEFT says when it has a pair on every layer of this model; None where it can.
    """

    make: Callable[[], nn.Module]
    batch: Mapping[str, Tensor]
    uncalled: tuple[str, ...] = ()
    all_linear: bool = True
    peft_fails: str | None = None

    def build(self) -> nn.Module:
        """Return a new model with the same random weights each time, in eval mode; buffers of norms random too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().eval()
            for path, one in [*model.named_parameters(), *model.named_buffers()]:
                if path.endswith(("bias", "running_mean")) and one.is_floating_point():
                    one.data.uniform_(-0.2, 0.2)
                elif path.endswith("running_var"):
                    one.data.uniform_(0.5, 1.5)
                elif one.ndim >= 2 and one.is_floating_point() and one.std() < 0.05:
                    one.data *= 5  # at the usual start one layer hardly shows in the logits
        return model


def _of(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Return a maker of a model class of transformers' with these fields in its configuration."""

    def make() -> nn.Module:
        kind = getattr(transformers, name)
        model: nn.Module = kind(kind.config_class(**fields))
        return model

    return make


_ENCODER: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 5,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_TEXT = {**_ENCODER, "vocab_size": 31, "max_position_embeddings": 40}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 31, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 0, "dropout": 0.0,
}  # fmt: skip
_T5: dict[str, Any] = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 31, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
_CLIP: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "projection_dim": 12,
}  # fmt: skip

_WORDS = {"input_ids": IDS, "labels": CLASSES}
_PAIRS = {"input_ids": IDS, "labels": LABELS}
_PICTURES = {"pixel_values": IMAGES, "labels": CLASSES}

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(_of("BertForSequenceClassification", **_TEXT), _WORDS),
    "roberta": Architecture(_of("RobertaForSequenceClassification", **_TEXT), _WORDS),
    "deberta": Architecture(
        _of("DebertaV2ForSequenceClassification", **_TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
        _WORDS, ("rel_embeddings",),
    ),
    "distilbert": Architecture(
        _of(
            "DistilBertForTokenClassification", vocab_size=31, dim=16, hidden_dim=24, n_layers=2, n_heads=2,
            num_labels=10, dropout=0.0, attention_dropout=0.0, max_position_embeddings=40,
        ),
        {"input_ids": IDS[:, :4], "labels": LABELS},
    ),
    "t5": Architecture(_of("T5ForConditionalGeneration", **_T5), _PAIRS, SHARED),
    "t5-gated-untied": Architecture(
        _of("T5ForConditionalGeneration", **_T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
        _PAIRS, SHARED,
    ),
    "bart": Architecture(_of("BartForConditionalGeneration", **_SEQ2SEQ), _PAIRS, SHARED),
    "whisper": Architecture(
        _of(
            "WhisperForConditionalGeneration", **_SEQ2SEQ, num_mel_bins=8, max_source_positions=8,
            max_target_positions=8, suppress_tokens=None, begin_suppress_tokens=None,
        ),
        {"input_features": SOUND, "labels": LABELS},
        peft_fails="no attribute 'stride'",  # Whisper's own forward asks its convolutions for it
    ),
    "vit": Architecture(
        _of("ViTForImageClassification", **_ENCODER, image_size=32, patch_size=16), _PICTURES
    ),
    "clip": Architecture(
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**_CLIP, "vocab_size": 31, "max_position_embeddings": 8, "eos_token_id": 2},
                vision_config={**_CLIP, "image_size": 32, "patch_size": 16}, projection_dim=12,
            )
        ),
        {"input_ids": IDS, "pixel_values": IMAGES, "return_loss": torch.tensor(True)},
    ),
    "swin": Architecture(
        _of(
            "SwinForImageClassification", image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
            window_size=4, num_labels=5, drop_path_rate=0.0,
        ),
        _PICTURES,
    ),
    "convnext": Architecture(
        _of(
            "ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=5,
            layer_scale_init_value=0.5,
        ),
        _PICTURES, peft_fails=GROUPS,
    ),
    "resnet": Architecture(
        _of(
            "ResNetForImageClassification", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_labels=5,
            layer_type="basic",
        ),
        _PICTURES, all_linear=False,
    ),
    "efficientnet": Architecture(
        _of(
            "EfficientNetForImageClassification", image_size=32, width_coefficient=0.5, depth_coefficient=0.5,
            hidden_dim=640, num_labels=5, in_channels=[32, 16, 24], out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5],
            strides=[1, 2, 2], num_block_repeats=[1, 1, 2], expand_ratios=[1, 6, 6], depthwise_padding=[],
            dropout_rate=0.0, drop_connect_rate=0.0,
        ),
        _PICTURES, all_linear=False, peft_fails=GROUPS,
    ),
    "convolutions": Architecture(Convolutions, _PICTURES, all_linear=False, peft_fails=GROUPS),
}  # fmt: skip
