"""What `all-linear` means for a mixture of experts, in words: what it covers, and what it leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import nn

from sideroad.config import AdapterConfig
from sideroad.kinds.experts import ExpertWeight, expert_weights
from sideroad.survey import ALL_LINEAR, Survey


@dataclass(frozen=True)
class MixtureNotes:
    """One line each, for people.

    Args:
        covered: that fused experts are adapted.
        left: what might be meant by "all" and is not adapted.
    """

    covered: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.covered, *self.left)


def mixture_notes(survey: Survey, config: AdapterConfig, targets: Collection[str]) -> MixtureNotes:
    """Return what is to be said about a choice of targets; nothing where the model has no experts.

    Args:
        targets: the paths that are adapted.
    """
    if ALL_LINEAR not in ((config.targets,) if isinstance(config.targets, str) else config.targets):
        return MixtureNotes()
    covered = []
    stacked = [path for path in targets if path in survey.experts]
    if stacked:
        counts = dict.fromkeys(view.count for path in stacked if isinstance(view := survey.modules[path], ExpertWeight))
        each = " or ".join(map(str, counts))
        covered.append(
            f"all-linear covers the fused experts: {_some(stacked)}, one pair for each of {each} experts"
        )
    left = []
    routers = [path for path in survey.linear if path in survey.routers and path not in targets]
    if routers:
        left.append(f"all-linear leaves routers frozen: {_some(routers)}; name them to adapt them")
    unknown = _unknown(survey)
    if unknown:
        left.append(
            f"all-linear leaves out {_some(unknown)}: stacked weights that are packed, or whose module does not say "
            "how many experts it has (num_experts)"
        )
    return MixtureNotes(tuple(covered), tuple(left))


def stacked_parameters(survey: Survey, names: Iterable[str]) -> dict[str, int]:
    """Return the adapter's parameters that hold a pair for each expert → how many experts there are.

    Args:
        names: `<path of a stacked weight>.A`, `.B`, and others.
    """
    views = {name: survey.experts.get(name.rpartition(".")[0]) for name in names}
    return {name: view.count for name, view in views.items() if isinstance(view, ExpertWeight)}


def _unknown(survey: Survey) -> list[str]:
    """Parameters of three or more dimensions that look like stacked weights and are not known as such."""
    found = []
    for path, module in survey.called.items():
        if survey.canonical[path] != path or path in survey.kinds or type(module).__module__.startswith("torch.nn."):
            continue
        known = expert_weights(module)
        found += [f"{path}.{name}" for name, one in module._parameters.items() if name not in known and _stacked(one)]
    return found


def _stacked(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.ndim >= 3 and min(parameter.shape) > 1


def _some(paths: Iterable[str]) -> str:
    """The first path, and how many there are of each last name."""
    listed = list(paths)
    return listed[0] if len(listed) == 1 else f"{listed[0]} and {len(listed) - 1} more"
