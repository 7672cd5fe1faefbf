"""Plain generation: batches of prompts in, new tokens out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from sideroad.base.loading import Base
from sideroad.errors import BaseModelError, raise_findings
from sideroad.modes import in_eval_mode

OnToken = Callable[[int], bool | None]
"""Called with each new token; False ends the generation."""

_PROBE = "sideroad"


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Iterable[int] = (),
    on_token: OnToken | None = None,
    batch_size: int = 32,
    on_finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt; return only the new tokens, in the order of the prompts, without the token that ended them.

    Prompts of similar length share a batch (left-padded), and a finished one leaves it. Greedy output does not depend
    on the other prompts of a batch, nor does sampled output: every prompt draws from its own generator. (Both hold up
    to rounding: a near tie may fall differently in another batch shape.) The model's adapters act as they are set.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: most tokens per prompt; a result of this length was cut, a shorter one ended by itself.
        temperature: 0 takes the likeliest token; above, samples from softmax(logits / temperature).
        top_p: samples among the likeliest tokens that together have this probability; 1 keeps all.
        seed: of the draws; prompt i draws from a generator seeded by (seed, i).
        stop_ids: ids that end a text besides those of `end_ids(base)`.
        on_token: sees each new token of a single prompt at once; returning False ends it. The stop token is not shown.
        batch_size: most prompts at once.
        on_finished: told after each step how many prompts are finished.
    Raises:
        BaseModelError: a prompt is empty, holds an unknown id, or does not fit the model's positions with the tokens
            asked for; a wrong number; `on_token` with several prompts; a model that does not generate text.
    """
    _check(base, prompts, max_new_tokens, temperature, top_p, on_token, batch_size)
    stops = frozenset(stop_ids) | end_ids(base)
    results: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with in_eval_mode(base.model):
        for start in range(0, len(order), batch_size):
            rows = [
                _Row(index, list(prompts[index]), results[index], _generator(seed, index) if temperature > 0 else None)
                for index in order[start : start + batch_size]
            ]
            for running in _continue(base, rows, max_new_tokens, temperature, top_p, stops, on_token):
                if on_finished is not None:
                    on_finished(min(start + batch_size, len(order)) - running)
    return results


def end_ids(base: Base) -> frozenset[int]:
    """Return the ids that end a text: the model's end-of-text ids, and what its chat template puts after an answer."""
    found: set[int] = set()
    settings = (getattr(base.model, "generation_config", None), base.model.config)
    for ids in (*(getattr(item, "eos_token_id", None) for item in settings), base.tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, (list, tuple)) else [ids] if ids is not None else [])
    turn = _end_of_turn(base.tokenizer)
    return frozenset(found if turn is None else found | {turn})


@dataclass
class _Row:
    index: int
    prompt: list[int]
    new: list[int]
    generator: torch.Generator | None
    done: bool = field(default=False)


def _end_of_turn(tokenizer: Any) -> int | None:
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # a template is a program of its own and may raise anything
        return None
    tail = text[text.rfind(_PROBE) + len(_PROBE) :]
    special = set(tokenizer.all_special_ids) | {
        index for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    return next((index for index in ids if index in special), None)


@torch.no_grad()
def _continue(
    base: Base,
    rows: list[_Row],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stops: frozenset[int],
    on_token: OnToken | None,
) -> Iterator[int]:
    """Extend one batch to its end; yields after each step how many rows go on."""
    accepted = inspect.signature(base.model.forward).parameters
    ids, mask = _left_pad([row.prompt for row in rows], base)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=base.model.config)
    for step in range(max_new_tokens):
        arguments: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
        if "position_ids" in accepted:
            arguments["position_ids"] = positions
        if "logits_to_keep" in accepted:
            # an index, not 1: the slice that 1 makes is not contiguous, and torch then copies the head once per row
            arguments["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits = base.model(input_ids=ids, **arguments).logits[:, -1].float()
        _append(rows, _choose(logits, rows, temperature, top_p), stops, on_token)
        kept = [place for place, row in enumerate(rows) if not row.done]
        if not kept or step + 1 == max_new_tokens:
            yield 0
            return
        yield len(kept)
        if len(kept) < len(rows):
            chosen = torch.tensor(kept, device=mask.device)
            rows = [rows[place] for place in kept]
            mask, positions = mask[chosen], positions[chosen]
            cache.batch_select_indices(chosen)
        ids = torch.tensor([[row.new[-1]] for row in rows], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _append(rows: Sequence[_Row], tokens: Sequence[int], stops: frozenset[int], on_token: OnToken | None) -> None:
    for row, token in zip(rows, tokens, strict=True):
        if token in stops:
            row.done = True
            continue
        row.new.append(token)
        if on_token is not None and on_token(token) is False:
            row.done = True


def _left_pad(prompts: Sequence[Sequence[int]], base: Base) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, longest - len(prompt) :] = torch.tensor(prompt)
        mask[place, longest - len(prompt) :] = 1
    return ids.to(base.device), mask.to(base.device)


def _choose(logits: Tensor, rows: Sequence[_Row], temperature: float, top_p: float) -> list[int]:
    """Pick one token per row of logits [rows, vocabulary]."""
    if temperature == 0:
        chosen: list[int] = logits.argmax(dim=-1).tolist()
        return chosen
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    return [
        int(torch.multinomial(row_probabilities, 1, generator=row.generator))
        for row_probabilities, row in zip(probabilities, rows, strict=True)
    ]


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens that together reach `top_p` (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, places = probabilities.sort(dim=-1, descending=True)
    # A token stays while those before it have not reached top_p, so the likeliest always stays.
    ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, places, ordered)


def _generator(seed: int, index: int) -> torch.Generator:
    # Distinct streams per prompt; the multiplier keeps (0, 1) and (1, 0) apart.
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % (1 << 63))


def _check(
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    on_token: OnToken | None,
    batch_size: int,
) -> None:
    findings = []
    if "past_key_values" not in inspect.signature(base.model.forward).parameters:
        findings.append(f"{type(base.model).__name__} keeps no key-value cache, so it does not generate text.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            findings.append(f"{name} is {value}; give at least 1.")
    if not 0 <= temperature < math.inf:
        findings.append(f"temperature is {temperature}; give 0 (likeliest token) or a number above.")
    if not 0 < top_p <= 1:
        findings.append(f"top_p is {top_p}; give more than 0 and at most 1.")
    if on_token is not None and len(prompts) != 1:
        findings.append(f"on_token follows one prompt; {len(prompts)} were given.")
    settings = base.model.config.get_text_config()
    positions, vocabulary = getattr(settings, "max_position_embeddings", None), settings.vocab_size
    for index, prompt in enumerate(prompts):
        if not prompt:
            findings.append(f"prompt {index} is empty; give at least one token.")
        elif min(prompt) < 0 or max(prompt) >= vocabulary:
            findings.append(f"prompt {index} holds ids outside 0..{vocabulary - 1}; is it this model's tokenizer?")
        elif positions is not None and len(prompt) + max_new_tokens > positions:
            findings.append(
                f"prompt {index} has {len(prompt)} tokens and asks for {max_new_tokens} more; the model has "
                f"{positions} positions. Shorten it, or ask for at most {max(positions - len(prompt), 0)}."
            )
    raise_findings(BaseModelError, "generation", findings)
