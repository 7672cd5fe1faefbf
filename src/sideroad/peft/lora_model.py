"""LoraModel: a model and its adapters, with the state that PEFT keeps: which are chosen, switched off, scaled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn

from sideroad.attaching import attach, attached
from sideroad.errors import AdapterError, MergeError, did_you_mean
from sideroad.handle import Attached
from sideroad.peft.config import LoraConfig
from sideroad.peft.new_layers import check_new
from sideroad.peft.refused import refuse, refuse_reserved, refuse_wrapped
from sideroad.peft.stored import Stored
from sideroad.peft.targeting import adapter_config, placed_config, refuse_foreign, settle


class LoraModel(nn.Module):
    """The base model (`.model`) and its adapters. Everything that is not found here is looked up on the base.

    The adapters live on the base's own layers (`sideroad.attach`); this object holds what PEFT's users switch. The
    chosen adapters act, unless they are disabled or merged.

    Args:
        model: the base, changed in place; it must have no adapters yet.
        peft_config: how the first adapter is made; `adapter_name`: its name. It acts at once.
        autocast_adapter_dtype: keep it in fp32 on a 16-bit base, else in the base's type.
        trainable: whether it requires gradients; by default unless `inference_mode` is set.
    Raises:
        ConfigError, TargetError: as in `LoraConfig` and `add`.
        AdapterError: the model has adapters already.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | Stored,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        trainable: bool | None = None,
    ) -> None:
        super().__init__()
        refuse_wrapped(model)
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, LoraConfig] = {}
        self._chosen: list[str] = []
        self._factors: dict[str, float] = {}
        self._off = False
        self._blocks = 0
        self.add(adapter_name, peft_config, autocast=autocast_adapter_dtype, trainable=trainable)

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside a `disabled` block is switched off until `enable_adapter_layers`; the block stays here."""
        return {**self.__dict__, "_off": self._off or self._blocks > 0, "_blocks": 0}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base with the adapters that act."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look up what is not here on the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):
                raise
            return getattr(self.model, name)

    @property
    def handle(self) -> Attached:
        """The base's handle.

        Raises:
            AdapterError: no adapter is left.
        """
        handle = attached(self.model)
        if handle is None:
            raise AdapterError("no adapter is left on this model; add_adapter or load_adapter brings one.")
        return handle

    @property
    def active_adapters(self) -> list[str]:
        """Names of the chosen adapters, also while they are disabled."""
        return list(self._chosen)

    @property
    def active_adapter(self) -> str | list[str]:
        """The chosen adapter, or a list of names where it is not exactly one."""
        return self._chosen[0] if len(self._chosen) == 1 else list(self._chosen)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters that are merged at present."""
        handle = attached(self.model)
        return list(handle.merged_names) if handle else []

    @property
    def enabled(self) -> bool:
        """Whether the chosen adapters act (in the forward, or merged)."""
        return not self._off and not self._blocks

    def add(
        self, name: str, what: LoraConfig | Stored, *, autocast: bool = True, trainable: bool | None = None
    ) -> None:
        """Add an adapter, new or finished. The first one is chosen; later ones wait for `set_adapter`.

        Args:
            trainable: by default only the first one is, unless `inference_mode` is set.
        Raises:
            AdapterError: the name is taken, or a finished adapter does not fit; nothing is changed.
            ConfigError, TargetError: the configuration is wrong, or wrong for this model.
        """
        first = not self.peft_config
        refuse_reserved(name)
        if isinstance(what, Stored):
            config = copy(what.config)
            value = replace(what.value, config=placed_config(what.value, self.model, autocast=autocast))
            attach(self.model, value, name, trainable=bool(trainable))
        else:
            refuse_foreign(what)
            config = settle(what, self.model)
            wanted = (first and not config.inference_mode) if trainable is None else trainable
            settled = adapter_config(config, self.model, autocast=autocast)
            check_new(self.model, settled)
            attach(self.model, settled, name, trainable=wanted, any_rank=True)
        self.peft_config[name] = config
        if first:
            self._chosen = [name]
        self.choose_again()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose which adapters act, and make exactly these trainable (none with `inference_mode`).

        Merged adapters are unmerged first, with a warning.

        Raises:
            AdapterError: an unknown name, or adapters that cannot act together; the choice is then unchanged.
        """
        names, merged = self.known(adapter_name), self.merged_adapters
        if merged:
            warnings.warn("set_adapter() on a merged model: it is unmerged first.", stacklevel=3)
            self.handle.unmerge()
        try:
            with self.handle.using(self.weighed(names)):
                pass  # adapters that cannot act together are refused before anything is changed
        except AdapterError:
            if merged:
                self.handle.merge(self.weighed(merged))
            raise
        self._chosen = names
        self.choose_again()
        self.handle.set_trainable(() if inference_mode else names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make these adapters trainable or not; the others stay as they are.

        Raises:
            AdapterError: an unknown name.
        """
        for name in self.known(adapter_names):
            for parameter in self.handle.parameters(name).values():
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only chosen one, the first that is left acts; no `requires_grad` changes.

        Raises:
            AdapterError: an unknown name. MergeError: adapters are merged.
        """
        self.known(adapter_name)
        self.handle.detach(adapter_name)
        del self.peft_config[adapter_name]
        self._factors.pop(adapter_name, None)
        if adapter_name in self._chosen:
            self._chosen.remove(adapter_name)
            if not self._chosen and self.peft_config:
                self._chosen = [next(iter(self.peft_config))]
                text = f'adapter "{adapter_name}" was active and is deleted; "{self._chosen[0]}" acts now.'
                warnings.warn(text, stacklevel=3)
        self.choose_again()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Give the base inside a `with` block, bit for bit, merged or not; afterwards all is as chosen."""
        try:
            with self.handle.disabled():
                self._blocks += 1
                try:
                    yield
                finally:
                    self._blocks -= 1
        finally:
            # what was chosen inside acts from here on
            self.choose_again()

    def disable_adapter_layers(self) -> None:
        """Let no adapter act until `enable_adapter_layers`.

        Raises:
            MergeError: adapters are merged: switching off never changes weights.
        """
        if self.merged_adapters:
            raise MergeError(
                f"disable_adapter_layers() while {', '.join(self.merged_adapters)} is merged into the weights; call "
                "unmerge_adapter() first, or use `with model.disable_adapter():`, which puts the base's weights aside."
            )
        self._off = True
        self.choose_again()

    def enable_adapter_layers(self) -> None:
        """Let the chosen adapters act again."""
        self._off = False
        self.choose_again()

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's own scale by a factor, in every layer; 1 is how it was made. It is not saved.

        Raises:
            AdapterError: an unknown name, or a factor that is not finite. MergeError: adapters are merged.
        """
        self.known(adapter_name)
        if self.merged_adapters:
            raise MergeError("set_scale() on merged adapters would change nothing; call unmerge_adapter() first.")
        if scale != 1 and self.peft_config[adapter_name].use_dora:
            refuse("set_scale on a DoRA adapter")
        if not math.isfinite(scale):
            raise AdapterError(f'the scale of adapter "{adapter_name}" is {scale}; it must be a finite number.')
        factors = {**self._factors, adapter_name: float(scale)}
        with self.handle.using({name: factors.get(name, 1.0) for name in [*self._chosen, adapter_name]}):
            pass  # a factor that cannot act is refused before it is kept
        self._factors = factors
        self.choose_again()

    def scale_layer(self, scale: float) -> None:
        """Multiply the present factor of every chosen adapter by `scale`, in every layer."""
        for name in self._chosen:
            self.set_scale(name, self._factors.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the chosen adapters by `scale`; None puts them back to 1."""
        if scale == 0:
            raise AdapterError("unscale_layer(0) would divide by zero; leave scale out to put the factors back to 1.")
        for name in self._chosen:
            self.set_scale(name, 1.0 if scale is None else self._factors.get(name, 1.0) / scale)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the chosen adapters, or those named, beside those that are merged already.

        The base's bytes are kept, and every merge starts from them: merging one after the other equals merging all.

        Args:
            safe_merge: without effect; a result that is not finite is always refused, with the weights intact.
        Raises:
            AdapterError: an unknown name.
            MergeError: a result that is not finite, a weight shared with another layer, or disabled adapters.
        """
        self._merge(adapter_names, keep_base=True)

    def unmerge_adapter(self) -> None:
        """Write the base's own bytes back; the chosen adapters act in the forward again."""
        if not self.merged_adapters:
            warnings.warn("nothing is merged, so there is nothing to unmerge.", stacklevel=2)
            return
        self.handle.unmerge()
        self.choose_again()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge the chosen adapters (or those named), remove all of them for good, and return the plain model.

        `progressbar` and `safe_merge` are without effect.

        Raises:
            AdapterError, MergeError: as in `merge_adapter`.
        """
        if adapter_names is not None and not adapter_names and not self.merged_adapters:
            return self.unload()
        self._merge(adapter_names, keep_base=False)
        self.handle.merge_and_unload()
        return self._emptied()

    def unload(self) -> nn.Module:
        """Remove all adapters, merged or not, and return the base exactly as it was before the first."""
        handle = attached(self.model)
        if handle is not None:
            if handle.merged_names:
                handle.unmerge()
            handle.detach()
        return self._emptied()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: combining adapters is not here yet."""
        refuse("add_weighted_adapter")

    def known(self, names: str | Sequence[str]) -> list[str]:
        """Return names as a list.

        Raises:
            AdapterError: some are not known; all of these are listed.
        """
        listed = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in listed if name not in self.peft_config]
        if unknown:
            guess = did_you_mean(str(unknown[0]), self.peft_config)
            shown = ", ".join(f'"{name}"' for name in unknown)
            there = ", ".join(self.peft_config) or "none"
            raise AdapterError(f"no adapter is named {shown}. There are: {there}.{guess}")
        return list(dict.fromkeys(listed))

    def _merge(self, names: Sequence[str] | None, *, keep_base: bool) -> None:
        if self._off:
            raise MergeError("merging while adapters are disabled; call enable_adapter_layers() first, or unload().")
        handle, merged = self.handle, self.merged_adapters
        wanted = list(dict.fromkeys([*merged, *self.known(self._chosen if names is None else names)]))
        if set(wanted) == set(merged):
            return
        if merged:
            handle.unmerge()
        try:
            handle.merge(self.weighed(wanted), keep_base=keep_base)
        except BaseException:
            if merged:
                handle.merge(self.weighed(merged))
            raise

    def weighed(self, names: Sequence[str]) -> dict[str, float]:
        """Return the factor of each of these adapters, as `set_scale` left it."""
        return {name: self._factors.get(name, 1.0) for name in names}

    def choose_again(self) -> None:
        """Make the handle's choice follow ours; a merged model keeps what is merged."""
        handle = attached(self.model)
        if handle is not None and not handle.merged_names:
            handle.activate(self.weighed(self._chosen if self.enabled else ()))

    def _emptied(self) -> nn.Module:
        self.peft_config.clear()
        self._factors.clear()
        self._chosen, self._off = [], False
        return self.model
