"""From examples to token ids with a mask: the one path by which text becomes training input."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from sideroad.data.config import DataConfig
from sideroad.data.messages import Example
from sideroad.data.spans import Span, assistant_spans
from sideroad.data.template import Template
from sideroad.errors import DataError

_ROWS_AT_ONCE = 256
_TRIMMED = ("Ġ", "Ċ", "ĉ", "č")


@dataclass(frozen=True)
class Encoded:
    """One sequence ready for a batch.

    Attributes:
        ids: its tokens.
        trained: for each token, whether the loss counts its prediction; never for the first, which nothing predicts.
        source: where the row came from, such as `train.jsonl:7`.
    """

    ids: list[int]
    trained: list[bool]
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """How many predictions the loss counts."""
        return sum(self.trained)


@dataclass(frozen=True)
class Outcome:
    """What became of one example.

    Attributes:
        encoded: the sequences to train on; none if the row was left out, several if a text was split.
        text: the rendered text; empty if rendering failed.
        prompt_end: length of the part of `text` before the last trained span.
        length: tokens before any cut.
        remarks: code → detail of what was noticed about this row (codes as in `findings`).
    """

    example: Example
    encoded: tuple[Encoded, ...] = ()
    text: str = ""
    prompt_end: int = 0
    length: int = 0
    remarks: dict[str, str] = field(default_factory=dict)


def encode_examples(examples: Iterable[Example], template: Template, config: DataConfig) -> Iterator[Outcome]:
    """Render, tokenise once, mark the trained tokens and apply the length limit.

    The text is tokenised as a whole with `add_special_tokens=False`. A token is trained if it begins inside an
    assistant's span; one that begins before it and reaches into it (a prompt that ends with a space, joined with the
    first word of the answer) is not, and is remarked on.

    Yields:
        One outcome per example, in order; a row that cannot be rendered carries the remark instead of raising.
    Raises:
        DataError: the tokenizer returns something other than ids and offsets.
    """
    remaining = iter(examples)
    while chunk := list(islice(remaining, _ROWS_AT_ONCE)):
        rendered = [_render(example, template, config) for example in chunk]
        tokens = _tokenise(template, [outcome.text for outcome, _ in rendered])
        for (outcome, spans), (ids, offsets) in zip(rendered, tokens, strict=True):
            yield outcome if "refused" in outcome.remarks else _encode(outcome, spans, ids, offsets, template, config)


def _render(example: Example, template: Template, config: DataConfig) -> tuple[Outcome, list[Span]]:
    try:
        if example.text is not None:
            text = template.document(example.text)
            return Outcome(example, text=text), [(0, len(text))]
        text = template.render(example.messages, example.tools)
        spans = _spans(example, template, text)
    except DataError as error:
        return Outcome(example, remarks={"refused": str(error)}), []
    end = spans[-1][0] if spans else len(text)
    return Outcome(example, text=text, prompt_end=end), [(0, len(text))] if config.train_on == "all" else spans


def _spans(example: Example, template: Template, text: str) -> list[Span]:
    if template.chat:
        return assistant_spans(template, example.messages, example.tools, text)
    last = example.messages[-1]
    start = len(template.render(example.messages[:1], generation=True))
    return [(start, len(text))] if last.role == "assistant" and last.weight else []


def _tokenise(template: Template, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    result = template.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    rows = list(zip(result["input_ids"], result["offset_mapping"], strict=True))
    for ids, offsets in rows:
        if len(ids) != len(offsets) or not all(isinstance(item, int) for item in ids):
            raise DataError(f"{type(template.tokenizer).__name__} returned no list of ids with offsets for a text")
    return rows


def _encode(
    outcome: Outcome, spans: Sequence[Span], ids: list[int], offsets: Sequence[tuple[int, int]],
    template: Template, config: DataConfig,
) -> Outcome:
    pieces = template.tokenizer.convert_ids_to_tokens(ids)
    trained, joined = mark(offsets, pieces, spans)
    trained[:1] = [False] * len(trained[:1])
    remarks = dict(outcome.remarks)
    if joined:
        remarks["joined-token"] = f"{joined} answers begin inside a token"
    bos = template.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        remarks["doubled-bos"] = f"begins with {template.tokenizer.bos_token} twice"
    whole = Encoded(ids, trained, outcome.example.source)
    if not any(trained):
        remarks["nothing-trained"] = "no assistant turn of weight 1" if not spans else "the trained turns are empty"
        fitted: tuple[Encoded, ...] = ()
    else:
        if outcome.example.text is None and all(trained[1:]) and config.train_on == "assistant":
            remarks["everything-trained"] = "there is nothing before the answer"
        fitted = fit(whole, config, remarks, keep_first=bos is not None and ids[0] == bos,
                     plain_text=outcome.example.text is not None)
    return replace(outcome, encoded=fitted, length=len(ids), remarks=remarks)


def mark(offsets: Sequence[tuple[int, int]], pieces: Sequence[str], spans: Sequence[Span]) -> tuple[list[bool], int]:
    """Decide for each token whether it begins inside a span.

    Args:
        offsets: character range of each token; byte-level tokenizers may leave a token's own leading space out.
        pieces: the tokens as the vocabulary writes them, to tell such a space from one that no token covers.
    Returns:
        The marks, and how many spans begin in the middle of a token (which is then not trained).
    """
    starts: list[int] = []
    covered = 0
    for (start, end), piece in zip(offsets, pieces, strict=True):
        starts.append(covered if covered < start and piece.startswith(_TRIMMED) else start)
        covered = max(covered, end)
    trained = [False] * len(offsets)
    joined = 0
    for begin, end in spans:
        first, behind = bisect_left(starts, begin), bisect_left(starts, end)
        trained[first:behind] = [True] * (behind - first)
        joined += bool(first and starts[first - 1] < begin < offsets[first - 1][1])
    return trained, joined


def fit(
    whole: Encoded, config: DataConfig, remarks: dict[str, str], *, keep_first: bool, plain_text: bool
) -> tuple[Encoded, ...]:
    """Apply `data.overlong`; returns nothing for a row that is left out.

    Args:
        remarks: receives `overlong`, `dropped`, `truncated-prompt`, `truncated-answer` or `split`.
        keep_first: the first token is BOS and survives a cut from the left.
        plain_text: the row may be split.
    """
    limit, rule = config.max_length, config.overlong
    if len(whole) <= limit:
        return (whole,)
    if rule == "auto":
        rule = "split" if plain_text else "drop"
    detail = f"{len(whole)} tokens"
    if rule == "error":
        remarks["overlong"] = detail
    elif rule == "split" and plain_text:
        remarks["split"] = detail
        return _split(whole, limit)
    elif rule == "truncate-end":
        return _cut_end(whole, limit, remarks, detail)
    elif rule == "truncate-prompt":
        return _cut_prompt(whole, limit, remarks, keep_first, detail)
    else:
        remarks["dropped"] = detail
    return ()


def _split(whole: Encoded, limit: int) -> tuple[Encoded, ...]:
    parts = []
    # Parts share one token: the last of a part is the context from which the next part's first target is predicted.
    for begin in range(0, len(whole) - 1, limit - 1):
        ids, trained = whole.ids[begin : begin + limit], whole.trained[begin : begin + limit]
        parts.append(Encoded(ids, [False, *trained[1:]], whole.source))
    return tuple(parts)


def _cut_end(whole: Encoded, limit: int, remarks: dict[str, str], detail: str) -> tuple[Encoded, ...]:
    kept = Encoded(whole.ids[:limit], whole.trained[:limit], whole.source)
    if not any(kept.trained):
        remarks["dropped"] = f"{detail}; the answer begins behind the limit"
        return ()
    if lost := whole.trained_tokens - kept.trained_tokens:
        remarks["truncated-answer"] = f"{detail}; {lost} of {whole.trained_tokens} trained tokens cut off"
    else:
        remarks["truncated-end"] = detail
    return (kept,)


def _cut_prompt(
    whole: Encoded, limit: int, remarks: dict[str, str], keep_first: bool, detail: str
) -> tuple[Encoded, ...]:
    first = int(keep_first)
    begin = len(whole) - (limit - first)
    # One token must stay before the first trained one, or nothing would predict it.
    if begin > whole.trained.index(True) - (1 - first):
        remarks["dropped"] = f"{detail}; the answers alone exceed the limit"
        return ()
    remarks["truncated-prompt"] = detail
    ids = whole.ids[:first] + whole.ids[begin:]
    trained = whole.trained[:first] + whole.trained[begin:]
    return (Encoded(ids, trained, whole.source),)
