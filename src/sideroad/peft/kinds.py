"""The words PEFT has for tasks and for kinds of adapters."""

from __future__ import annotations

from enum import StrEnum


class TaskType(StrEnum):
    """What a model is for; decides which subclass of `PeftModel` wraps it and which heads are trained whole."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The kind of an adapter; LoRA is the one there is (other kinds in a file are refused by name)."""

    LORA = "LORA"
