"""What `bench/methods.py` trains on: tasks, their budgets, and where each task's rows come from.

Every run of a task sees the same rows in the order of its seed, for the same number of steps. Rates are chosen on rows
held out of train; test is what the data set scores on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from method_table import CAUSAL, ENCODER, METHODS

ROOT = Path(__file__).resolve().parent.parent
MINILM, SMOLLM = "all-minilm-l6-v2", "smollm2-135m-instruct"
HEAD_RATE = 3e-2
"""Peak rate of a classifier's head beside any method; near the best for the head alone on banking77 (method `head`)."""


@dataclass(frozen=True)
class Classes:
    """Rows with a label; files below the data directory, columns of the one or two texts."""

    train: str
    test: str
    columns: tuple[str, ...]
    max_length: int


@dataclass(frozen=True)
class Answers:
    """Prompts and answers.

    Attributes:
        train: JSON lines with `columns`; test rows have one answer, or a list of references in `references`.
        validation: a file of its own; empty: rows held out of train.
        committed: the files are the repository's, not below the data directory.
    """

    train: str
    test: str
    columns: tuple[str, str] = ("prompt", "completion")
    validation: str = ""
    references: str = ""
    committed: bool = False
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Budget:
    """How much one run sees: steps of `batch_size` rows, held-out rows to choose by, test rows (None: all)."""

    steps: int
    batch_size: int
    validation: int
    test: int | None


@dataclass(frozen=True)
class Task:
    """One comparison.

    Attributes:
        metric: of the test score that is reported, in percent; `choose` names the validation number that chooses a
            rate, the larger the better, or the smaller for `loss`.
        methods: those that take part.
        seconds: about what one run takes on two cores, for the estimate until runs have been timed.
    """

    what: str
    base: str
    kind: str
    source: Classes | Answers
    metric: str
    choose: str
    budget: Budget
    quick: Budget
    methods: tuple[str, ...]
    seconds: float


_ALL = tuple(METHODS)
QUICK_METHODS, QUICK_TASKS = ("full", "lora", "dora"), ("banking77", "snips", "e2e")
"""What a quick run looks at unless told."""
TASKS: Mapping[str, Task] = {
    "banking77": Task(
        "77 intents of bank customers, MiniLM",
        MINILM,
        ENCODER,
        Classes("banking77/train.jsonl", "banking77/test.jsonl", ("text",), 64),
        metric="accuracy",
        choose="accuracy",
        budget=Budget(steps=400, batch_size=32, validation=1000, test=None),
        quick=Budget(steps=24, batch_size=32, validation=300, test=300),
        methods=_ALL,
        seconds=60,
    ),
    "rte": Task(
        "RTE (entailment of a sentence pair), MiniLM; the test rows are GLUE's validation",
        MINILM,
        ENCODER,
        Classes("glue/rte/train.jsonl", "glue/rte/validation.jsonl", ("premise", "hypothesis"), 128),
        metric="accuracy",
        choose="accuracy",
        budget=Budget(steps=200, batch_size=16, validation=400, test=None),
        quick=Budget(steps=20, batch_size=16, validation=100, test=100),
        methods=_ALL,
        seconds=90,
    ),
    "snips": Task(
        "voice command to JSON (the quick start's rows), SmolLM2-135M",
        SMOLLM,
        CAUSAL,
        Answers("examples/quickstart/train.jsonl", "examples/quickstart/validation.jsonl", committed=True),
        metric="exact_match",
        choose="loss",
        budget=Budget(steps=120, batch_size=8, validation=90, test=None),
        quick=Budget(steps=8, batch_size=4, validation=14, test=7),
        methods=("full", "lora", "dora", "pissa", "lora+"),
        seconds=150,
    ),
    "e2e": Task(
        "E2E NLG, a subset, BLEU over all references, SmolLM2-135M",
        SMOLLM,
        CAUSAL,
        Answers(
            "e2e_nlg/train_5k.jsonl",
            "e2e_nlg/test.jsonl",
            ("mr", "ref"),
            validation="e2e_nlg/valid.jsonl",
            references="refs",
        ),
        metric="bleu",
        choose="loss",
        budget=Budget(steps=100, batch_size=8, validation=120, test=150),
        quick=Budget(steps=6, batch_size=4, validation=12, test=6),
        methods=("full", "lora"),
        seconds=180,
    ),
}


def missing(name: str, data: Path) -> Path | None:
    """Return a file that a task needs and that is not there; None if it can be run."""
    source = TASKS[name].source
    folder = ROOT if isinstance(source, Answers) and source.committed else data
    wanted = [source.train, source.test, getattr(source, "validation", "")]
    return next((folder / file for file in wanted if file and not (folder / file).exists()), None)
