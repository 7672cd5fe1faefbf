"""From rows to examples: which format the columns mean, and one reader per format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sideroad.data.config import DataConfig
from sideroad.data.messages import Example, Message, read_messages, read_sharegpt, read_tools
from sideroad.data.readers import Row
from sideroad.errors import DataError, did_you_mean

_REQUIRED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "chat": {"messages": ("messages", "conversations", "conversation")},
    "sharegpt": {"conversations": ("conversations", "conversation", "messages")},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response")},
    "prompt-completion": {
        "prompt": ("prompt", "question", "input", "instruction", "query"),
        "completion": ("completion", "response", "answer", "output"),
    },
    "text": {"text": ("text", "content")},
}
_OPTIONAL: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "chat": {"tools": ("tools",)},
    "sharegpt": {"system": ("system",), "tools": ("tools",)},
    "alpaca": {"input": ("input", "context"), "system": ("system",)},
    "prompt-completion": {"system": ("system",), "tools": ("tools",)},
    "text": {},
}
_BESIDE_TEXT = frozenset(
    ["id", "idx", "index", "url", "source", "meta", "metadata", "timestamp", "date", "title", "lang", "language",
     "dump", "file_path", "language_score", "token_count"]
)
_NEEDS = """Formats and the columns each needs:
  chat               messages: [{"role": "user", "content": …}, …]; optional tools
  prompt-completion  prompt, completion (or question/answer, prompt/response, input/output …); optional system, tools
  alpaca             instruction, output; optional input, system
  sharegpt           conversations: [{"from": "human", "value": …}, …]; optional system, tools
  text               text, trained on as a whole
Other names: data.columns, such as {prompt: question, completion: sql}; another meaning: data.format."""
_ALPACA_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
_ALPACA_PLAIN = "### Instruction:\n{instruction}\n\n### Response:\n"


@dataclass(frozen=True)
class Layout:
    """What the columns of a source mean.

    Attributes:
        format: one of `DataConfig.format`, never `auto`.
        columns: our name → the column it is read from.
        unused: columns that play no part.
    """

    format: str
    columns: Mapping[str, str]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """Return one line for people: format, mapping, what is left over."""
        mapping = ", ".join(ours if ours == theirs else f"{ours} ← {theirs}" for ours, theirs in self.columns.items())
        return f"{self.format} ({mapping})" + (f"; not used: {', '.join(self.unused)}" if self.unused else "")


def detect(rows: Sequence[Row], config: DataConfig) -> Layout:
    """Decide what the rows mean, by their columns and `data.format` and `data.columns`.

    Raises:
        DataError: no format or several fit; lists the columns found and what each format needs.
    """
    found = list(dict.fromkeys(column for row in rows[:1000] for column in row.values))
    _check_columns(config, found)
    if config.format != "auto":
        return _layout(config.format, found, config)
    fitting = [name for name in _REQUIRED if _fits(name, found, rows, config)]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")
    if fitting == ["alpaca", "prompt-completion"]:
        fitting = ["alpaca"] if "instruction" in found else ["prompt-completion"]
    listed = f"columns found: {', '.join(found)} ({rows[0].place})"
    if len(fitting) > 1:
        raise DataError(f"the format is ambiguous, {' and '.join(fitting)} fit; {listed}. Set data.format.\n{_NEEDS}")
    only_text = fitting == ["text"] and not config.columns
    if not fitting or (only_text and not set(found) <= _BESIDE_TEXT | {"text", "content"}):
        raise DataError(f"unknown format; {listed}.{_advice(found)}\n{_NEEDS}")
    if {"chosen", "rejected"} <= set(found) and not config.columns:
        raise DataError(f"unknown format: these look like preference pairs; {listed}.{_advice(found)}\n{_NEEDS}")
    return _layout(fitting[0], found, config)


def read_examples(rows: Iterable[Row], layout: Layout, *, templated: bool) -> tuple[Example, ...]:
    """Turn rows into examples.

    Args:
        templated: whether a chat template will render them; without one, alpaca rows get alpaca's own headings.
    Raises:
        DataError: file, line and field of the first 20 rows that do not fit the format, and how many there are.
    """
    read = _READERS[layout.format]
    examples: list[Example] = []
    problems: list[str] = []
    for row in rows:
        try:
            examples.append(read(row, _fields(row, layout), templated))
        except DataError as error:
            problems.append(f"{row.place}: {error}")
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:20])
        rest = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise DataError(f"{len(problems)} rows do not fit the format {layout.describe()}.\n{shown}{rest}")
    return tuple(examples)


def _check_columns(config: DataConfig, found: list[str]) -> None:
    known = sorted({name for table in (_REQUIRED, _OPTIONAL) for fields in table.values() for name in fields})
    for ours, theirs in config.columns.items():
        if ours not in known:
            raise DataError(f'data.columns: unknown name "{ours}".{did_you_mean(ours, known)} '
                            f"Allowed: {', '.join(known)}")
        if theirs not in found:
            raise DataError(f'data.columns: {ours}: there is no column "{theirs}".{did_you_mean(theirs, found)} '
                            f"Columns found: {', '.join(found)}")


def _source_of(ours: str, names: tuple[str, ...], found: Sequence[str], config: DataConfig) -> str | None:
    if ours in config.columns:
        return config.columns[ours]
    taken = set(config.columns.values())
    return next((name for name in names if name in found and name not in taken), None)


def _fits(name: str, found: list[str], rows: Sequence[Row], config: DataConfig) -> bool:
    mapped = set(config.columns)
    if not mapped <= set(_REQUIRED[name]) | set(_OPTIONAL[name]):
        return False
    sources = [_source_of(ours, names, found, config) for ours, names in _REQUIRED[name].items()]
    if None in sources or len(set(sources)) < len(sources):
        return False
    if name in ("chat", "sharegpt"):
        speaks_sharegpt = '"from"' in repr(rows[0].values.get(str(sources[0]))).replace("'", '"')
        return speaks_sharegpt == (name == "sharegpt")
    # Columns named in the recipe settle the matter; an alias for something else must not compete with them.
    return not mapped or bool(mapped & set(_REQUIRED[name]))


def _layout(name: str, found: list[str], config: DataConfig) -> Layout:
    columns: dict[str, str] = {}
    missing = []
    for ours, names in {**_REQUIRED[name], **_OPTIONAL[name]}.items():
        theirs = _source_of(ours, tuple(n for n in names if n not in columns.values()), found, config)
        if theirs is not None:
            columns[ours] = theirs
        elif ours in _REQUIRED[name]:
            missing.append(ours)
    foreign = [ours for ours in config.columns if ours not in columns]
    if missing or foreign:
        told = f"needs the column {' and '.join(missing)}" if missing else f"has no column called {', '.join(foreign)}"
        raise DataError(f"data.format: {name} {told}; columns found: {', '.join(found)}.\n{_NEEDS}")
    unused = tuple(column for column in found if column not in columns.values())
    return Layout(name, columns, unused)


def _advice(found: list[str]) -> str:
    label = next((name for name in ("label", "labels", "target", "intent", "class") if name in found), None)
    if {"chosen", "rejected"} <= set(found):
        ours = "output" if "instruction" in found else "completion"
        return f" Pairs cannot be trained on; to train on the preferred answers, set data.columns: {{{ours}: chosen}}."
    if "text" in found and label:
        return (f" To answer each text with its {label}: data.columns: {{prompt: text, completion: {label}}}; "
                "to train on the text alone: data.format: text.")
    if "text" in found:
        return " To train on the text alone: data.format: text."
    return ""


def _fields(row: Row, layout: Layout) -> dict[str, Any]:
    fields = {ours: row.values.get(theirs) for ours, theirs in layout.columns.items()}
    for ours in _REQUIRED[layout.format]:
        if fields[ours] is None:
            theirs = layout.columns[ours]
            state = "is null" if theirs in row.values else f"is missing (columns here: {', '.join(row.values)})"
            raise DataError(f'"{theirs}" {state}')
    return fields


def _text(fields: Mapping[str, Any], name: str, layout_name: str | None = None) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f'"{layout_name or name}" must be text; found {str(value)[:60]!r} ({type(value).__name__})')
    return value


def _system(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    text = _text(fields, "system")
    return (Message("system", text),) if text else ()


def _read_chat(row: Row, fields: Mapping[str, Any], templated: bool) -> Example:
    return Example(row.source, read_messages(fields["messages"]), tools=read_tools(fields.get("tools")))


def _read_sharegpt_row(row: Row, fields: Mapping[str, Any], templated: bool) -> Example:
    messages = read_sharegpt(fields["conversations"])
    has_system = bool(messages) and messages[0].role == "system"
    system = () if has_system else _system(fields)
    return Example(row.source, system + messages, tools=read_tools(fields.get("tools")))


def _read_pair(row: Row, fields: Mapping[str, Any], templated: bool) -> Example:
    prompt, completion = fields["prompt"], fields["completion"]
    before = (read_messages(prompt, context_only=True) if isinstance(prompt, list)
              else (Message("user", _text(fields, "prompt")),))
    after = (read_messages(completion) if isinstance(completion, list)
             else (Message("assistant", _text(fields, "completion")),))
    return Example(row.source, _system(fields) + before + after, tools=read_tools(fields.get("tools")))


def _read_alpaca(row: Row, fields: Mapping[str, Any], templated: bool) -> Example:
    instruction, given, output = (_text(fields, name) for name in ("instruction", "input", "output"))
    if templated:
        prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    else:
        prompt = (_ALPACA_INPUT if given.strip() else _ALPACA_PLAIN).format(instruction=instruction, input=given)
    return Example(row.source, (*_system(fields), Message("user", prompt), Message("assistant", output)))


def _read_text(row: Row, fields: Mapping[str, Any], templated: bool) -> Example:
    text = _text(fields, "text")
    if not text.strip():
        raise DataError('"text" is empty')
    return Example(row.source, text=text)


_READERS: Mapping[str, Callable[[Row, Mapping[str, Any], bool], Example]] = {
    "chat": _read_chat,
    "sharegpt": _read_sharegpt_row,
    "alpaca": _read_alpaca,
    "prompt-completion": _read_pair,
    "text": _read_text,
}
