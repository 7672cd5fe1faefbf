"""The `data` section of a recipe; importing it loads neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator

from sideroad.config import Settings

Format = Literal["auto", "chat", "prompt-completion", "alpaca", "sharegpt", "text"]
Packing = Literal["auto", "on", "off"]
SharePrefixes = Literal["auto", "off"]
Overlong = Literal["auto", "drop", "split", "truncate-prompt", "truncate-end", "error"]
TrainOn = Literal["assistant", "all"]

NO_SYSTEM = "none"
"""Value of `system` that leaves the system turn out, whatever the template would insert."""


class DataConfig(Settings):
    """Where the rows are, what they mean, and how they become tokens with a loss mask.

    A source is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`; all but Parquet also with `.gz`), a
    directory of such files, or a hub set: `owner/name`, `owner/name:split` or `owner/name:config/split`, with `hub:` in
    front or not. Relative paths start at the recipe file. Of a directory with `train…` and `validation…` files, each
    key takes its own.
    """

    train: str | tuple[str, ...]
    """One source or several, read in this order."""
    validation: str | None = None
    """A source that is only scored, never trained on."""
    format: Format = "auto"
    """Meaning of a row; `auto` decides by the columns and says what it found."""
    columns: Mapping[str, str] = {}
    """Our column name → theirs, such as `{prompt: question, completion: answer}`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest sequence, in tokens."""
    packing: Packing = "auto"
    """Several sequences in one row, isolated from each other: where the model can (`auto`), always or never."""
    share_prefixes: SharePrefixes = "auto"
    """Beginnings that sequences of a batch have in common (system prompt, instruction) are computed once, exactly:
    wherever that is possible and saves work (`auto`), or never."""
    overlong: Overlong = "auto"
    """Rows above max_length: `drop`, `split` (plain text only), `truncate-prompt` (from the left, answers stay whole),
    `truncate-end`, or `error`. `auto`: split plain text, drop other rows. Every such row is counted and reported."""
    system: str | None = None
    """System message for rows without one; `null`: as the template does; `""`: an empty one; `none`: no system turn,
    not even the template's default one (rows with tools keep theirs)."""
    chat_template: str | None = None
    """A Jinja file to use instead of the tokenizer's own chat template."""
    train_on: TrainOn = "assistant"
    """What the loss counts: assistant turns with weight 1, or every token of the conversation."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows of train, from the top."""
    validation_limit: Annotated[int, Field(ge=1)] | None = None
    """Use only this many rows of validation, from the top."""

    @field_validator("train", "validation", "chat_template")
    @classmethod
    def _reject_blank(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        given = (value,) if isinstance(value, str) else value
        if given is not None and (not given or not all(item.strip() for item in given)):
            raise ValueError("a source is empty; give a file, a directory or a hub set")
        return value

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The training sources, also where a single one was given."""
        return (self.train,) if isinstance(self.train, str) else self.train
