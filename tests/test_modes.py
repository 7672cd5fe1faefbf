"""modes: eval mode for a while, each module's own mode afterwards."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from sideroad.modes import in_eval_mode


def test_each_module_gets_its_own_mode_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with suppress(KeyError), in_eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert before.count(False) == 1
