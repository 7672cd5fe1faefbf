"""What is noticed about a data set before anything trains on it, and the refusal to train on what is broken.

    code                        severity
    refused                     error     the template refuses a row, or its assistant turn cannot be found in the text
    nothing-trained-at-all      error     no row has a trained token
    everything-trained-at-all   error     no row has anything before its answer, although only answers should be trained
    end-of-turn-untrained       error     no row teaches the model to stop
    doubled-bos                 error     rows begin with BOS twice
    overlong                    error     rows above max_length with `overlong: error`
    beyond-model                error     sequences longer than the model's positions
    nothing-trained             warning   rows without a trained token, left out
    everything-trained          warning   rows with nothing before the answer
    end-of-turn-missing         warning   rows in which an answer's end is not trained
    dropped                     warning   rows left out because of their length
    truncated-answer            warning   rows whose answers are cut off
    truncated-prompt, truncated-end, split      note      rows cut or split without loss of an answer
    joined-token                warning   answers that begin in the middle of a token
    empty-answer                warning   assistant turns without text
    lost-content                warning   text of a message, a tool or a call of one that the template does not show
    rewritten-content           note      text of a message that the template changes in its white space
    special-token               warning   text of a message that contains a special token
    duplicates                  warning   rows that occur more than once
    validation-in-train         warning   validation rows that are trained on
    validation-prompt-in-train  warning   validation prompts that are trained on with another answer
    few-rows                    warning   too few rows to learn from
    dated-template              warning   the template writes today's date into every row
    columns                     note      the format, its mapping and the columns left over
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sideroad.data.config import DataConfig
from sideroad.data.encode import Outcome
from sideroad.data.messages import Example
from sideroad.data.template import Template
from sideroad.errors import DataError, raise_findings

Severity = Literal["error", "warning", "note"]
_FEW = 10
_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a data set.

    Attributes:
        code: stable name, for tests and machines.
        message: complete sentence with counts and, where something can be done, what.
        examples: the first few places, such as `train.jsonl:7: 812 tokens`.
        count: rows concerned.
    """

    code: str
    severity: Severity
    message: str
    examples: tuple[str, ...] = ()
    count: int = 0

    def __str__(self) -> str:
        more = " …" if self.count > len(self.examples) else ""
        shown = f" [{'; '.join(self.examples)}{more}]" if self.examples else ""
        return f"{self.message}{shown} ({self.code})"


def refuse(findings: Iterable[Finding]) -> None:
    """Raise if any finding is an error.

    Raises:
        DataError: every error finding.
    """
    raise_findings(DataError, "the data cannot be trained on",
                   [str(finding) for finding in findings if finding.severity == "error"])


_BY_REMARK: Mapping[str, tuple[Severity, str]] = {
    "refused": ("error", "{rows} cannot be rendered"),
    "doubled-bos": ("error", "{rows} with BOS twice at the start; remove it from the data or from the chat template"),
    "overlong": ("error", "{rows} above max_length {limit}; raise data.max_length or choose data.overlong"),
    "nothing-trained": ("warning", "{rows} without a trained token, left out"),
    "everything-trained": ("warning", "{rows} with nothing before the answer: every token is trained on"),
    "end-of-turn-missing": ("warning", "{rows} in which an answer's end is not trained"),
    "dropped": ("warning", "{rows} above max_length {limit}, left out; raise data.max_length or set data.overlong"),
    "truncated-answer": ("warning", "{rows} with answers cut off at max_length {limit}"),
    "truncated-prompt": ("note", "{rows} with the prompt cut from the left to fit max_length {limit}"),
    "truncated-end": ("note", "{rows} cut at max_length {limit} behind the last answer's end or in a later prompt"),
    "split": ("note", "{rows} split into pieces of at most {limit} tokens"),
    "joined-token": ("warning", "{rows} in which an answer begins inside a token, which is not trained; "
                     "end prompts without a space, or begin answers without one"),
    "empty-answer": ("warning", "{rows} with an empty answer"),
    "lost-content": ("warning", "{rows} with text or tools that the chat template does not show"),
    "rewritten-content": ("note", "{rows} with white space that the chat template changes"),
    "special-token": ("warning", "{rows} with a special token written out in a message; it acts as that token"),
}


def examine(
    outcomes: Sequence[Outcome], template: Template, config: DataConfig, max_positions: int | None
) -> list[Finding]:
    """Return the findings about one set, from the remarks on its rows and from the whole of it."""
    remarks = [
        (outcome.example.source, {**outcome.remarks, **_content_remarks(outcome, template)}) for outcome in outcomes
    ]
    findings = []
    for code, (severity, message) in _BY_REMARK.items():
        places = [f"{source}: {found[code]}" for source, found in remarks if code in found]
        if places:
            told = message.format(rows=_rows(len(places), len(outcomes)), limit=config.max_length)
            findings.append(Finding(code, severity, told, tuple(places[:_SHOWN]), len(places)))
    return findings + _whole(outcomes, template, config, max_positions) + _duplicates(outcomes)


def overlap(train: Sequence[Outcome], validation: Sequence[Outcome]) -> list[Finding]:
    """Return findings about validation rows and prompts that train holds too, whatever their case and white space."""
    rows = {_normal(outcome.text) for outcome in train}
    prompts = {_normal(outcome.text[: outcome.prompt_end]) for outcome in train if outcome.example.has_answer}
    same = [outcome.example.source for outcome in validation if outcome.text and _normal(outcome.text) in rows]
    known = set(same)
    asked = [outcome.example.source for outcome in validation
             if outcome.example.has_answer and outcome.example.source not in known
             and outcome.prompt_end and _normal(outcome.text[: outcome.prompt_end]) in prompts]
    findings = []
    if same:
        findings.append(Finding("validation-in-train", "warning",
                                f"{_rows(len(same), len(validation))} of validation also in train; validation scores "
                                "will flatter", tuple(same[:_SHOWN]), len(same)))
    if asked:
        findings.append(Finding("validation-prompt-in-train", "warning",
                                f"{_rows(len(asked), len(validation))} of validation with a prompt that train answers "
                                "differently", tuple(asked[:_SHOWN]), len(asked)))
    return findings


def _whole(
    outcomes: Sequence[Outcome], template: Template, config: DataConfig, max_positions: int | None
) -> list[Finding]:
    findings = []
    used = [outcome for outcome in outcomes if outcome.encoded]
    chats = [outcome for outcome in used if outcome.example.text is None]
    if not used:
        findings.append(Finding("nothing-trained-at-all", "error",
                                f"none of the {len(outcomes)} rows has a trained token within max_length "
                                f"{config.max_length}"))
    elif chats and len(chats) == len(used) and all("everything-trained" in outcome.remarks for outcome in chats):
        findings.append(Finding("everything-trained-at-all", "error",
                                "no row has anything before its answer, so every token would be trained on; check the "
                                "columns, or set data.train_on: all, or data.format: text"))
    if used and not any(_ends(outcome, template) for outcome in used):
        end = template.turn_end if chats else template.tokenizer.eos_token
        why = (f"the end of turn {end!r} is trained in no row" if end
               else "the chat template ends an answer without an end-of-turn token of the tokenizer"
               if template.chat and chats else "the tokenizer has no EOS token")
        findings.append(Finding("end-of-turn-untrained", "error",
                                f"{why}, so the model would never learn to stop; mend the tokenizer or set "
                                "data.chat_template"))
    longest = max((len(item) for outcome in used for item in outcome.encoded), default=0)
    if max_positions is not None and longest > max_positions:
        findings.append(Finding("beyond-model", "error", f"the longest sequence has {longest} tokens, but the model "
                                f"takes at most {max_positions}; set data.max_length: {max_positions}"))
    sequences = sum(len(outcome.encoded) for outcome in used)
    if 0 < sequences < _FEW:
        findings.append(Finding("few-rows", "warning", f"only {sequences} rows to learn from", count=sequences))
    if template.chat and "strftime_now" in str(template.source or template.tokenizer.chat_template):
        findings.append(Finding("dated-template", "warning", "the chat template may write today's date into every row, "
                                "so the same data gives other tokens tomorrow; set data.system or data.chat_template"))
    return findings


def _ends(outcome: Outcome, template: Template) -> bool:
    end = template.turn_end if outcome.example.text is None else template.tokenizer.eos_token
    if end is None:
        return False
    wanted = template.tokenizer.convert_tokens_to_ids(end)
    return any(trained and token == wanted
               for item in outcome.encoded for token, trained in zip(item.ids, item.trained, strict=True))


def _content_remarks(outcome: Outcome, template: Template) -> dict[str, str]:
    if not outcome.text or outcome.example.text is not None:
        return {}
    found: dict[str, str] = {}
    if outcome.encoded and template.turn_end and not _ends(outcome, template):
        found["end-of-turn-missing"] = f"no trained {template.turn_end}"
    specials = _pattern(tuple(template.tokenizer.all_special_tokens))
    for number, message in enumerate(outcome.example.messages, 1):
        content = message.content
        if message.role == "assistant" and not content.strip() and not message.tool_calls:
            found["empty-answer"] = f"message {number}"
        if match := specials(content):
            found["special-token"] = f"message {number}: {match}"
        if content in outcome.text:
            continue
        if "".join(content.split()) in "".join(outcome.text.split()):
            found["rewritten-content"] = f"message {number}"
        else:
            found["lost-content"] = f"message {number} ({message.role}): {content[:40]!r}"
    if lost := [name for name in _functions(outcome.example) if name not in outcome.text]:
        found["lost-content"] = f"no trace of the tool {lost[0]!r}"
    return found


def _functions(example: Example) -> Iterator[str]:
    """Names of the functions an example describes or calls."""
    for described in (*example.tools, *(call for message in example.messages for call in message.tool_calls)):
        name = described.get("function", described).get("name")
        if isinstance(name, str):
            yield name


def _pattern(specials: tuple[str, ...]) -> Callable[[str], str | None]:
    if not specials:
        return lambda text: None
    search = re.compile("|".join(re.escape(token) for token in specials)).search
    return lambda text: match.group() if (match := search(text)) else None


def _duplicates(outcomes: Sequence[Outcome]) -> list[Finding]:
    seen: Counter[str] = Counter()
    again = []
    for outcome in outcomes:
        if not outcome.text:
            continue
        key = _normal(outcome.text)
        if seen[key]:
            again.append(outcome.example.source)
        seen[key] += 1
    if not again:
        return []
    return [Finding("duplicates", "warning", f"{_rows(len(again), len(outcomes))} repeat an earlier row",
                    tuple(again[:_SHOWN]), len(again))]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _rows(count: int, total: int) -> str:
    return f"{count} of {total} row{'' if total == 1 else 's'}"
