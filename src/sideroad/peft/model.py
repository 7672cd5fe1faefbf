"""PeftModel: the wrapper that PEFT's programs hold, around a LoraModel around the base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from sideroad.adapter_files import directory_name
from sideroad.attaching import attached
from sideroad.base.adapters import adapter_directory
from sideroad.errors import AdapterError, ConfigError
from sideroad.peft import status
from sideroad.peft.card import write_card
from sideroad.peft.checkpointing import feed_gradients, starve_gradients
from sideroad.peft.config import LoraConfig
from sideroad.peft.files import (
    making_room,
    own_place,
    read_stored,
    refuse_options,
    value_of,
    warn_of_unsaved,
    write_adapter,
)
from sideroad.peft.kinds import PeftType
from sideroad.peft.lora_model import LoraModel
from sideroad.peft.new_layers import refuse_resizing
from sideroad.peft.refused import refuse
from sideroad.peft.reported import Reported
from sideroad.peft.rows import copies_in, rows, rows_in
from sideroad.peft.stored import Stored
from sideroad.peft.tensors import LoadResult, gathered, live_parts, refuse_embeddings
from sideroad.peft_keys import ROOT


class PeftModel(Reported, nn.Module):
    """A base with adapters, with PEFT's methods. What is not found here is looked up on the LoraModel and the base.

    Parameters keep the base's own names: `base_model.model.<path>.weight`, and `….lora.<adapter>.A` and `.B`;
    `get_peft_model_state_dict` gives PEFT's names, which files have too.

    Args:
        model: the base, changed in place.
        peft_config: how the first adapter is made.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters of a 16-bit base in fp32, else in the base's type.
        low_cpu_mem_usage: without effect; the tensors of an adapter are made once, at once.
    Raises:
        ConfigError, TargetError: as in `LoraConfig` and `LoraModel`.
        AdapterError: the model has adapters already.
    """

    base_model: LoraModel

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | Stored,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        trainable: bool | None = None,
    ) -> None:
        super().__init__()
        self.base_model = LoraModel(model, peft_config, adapter_name, autocast_adapter_dtype, trainable)
        self.training = model.training
        self.peft_type = PeftType.LORA
        self._feeds_gradients = feed_gradients(model)

    def __getattr__(self, name: str) -> Any:
        """Look up what is not here on the LoraModel, and there on the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the model.

        Args:
            adapter_names: one for each row of the batch; "__base__" means the base. The others do not act then.
        Raises:
            AdapterError: an unknown name, another number of rows, or adapters that are disabled.
            MergeError: adapters are merged.
        """
        with rows(self.base_model, adapter_names, rows_in(args, kwargs)):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate with the base's own `generate`; `adapter_names` as in `forward`, one for each prompt."""
        base: Any = self.get_base_model()
        with rows(self.base_model, adapter_names, rows_in(args, kwargs), copies_in(base, kwargs)):
            return base.generate(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter → its configuration, a copy of the one it was made with."""
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        """The chosen adapter, or a list of names where it is not exactly one."""
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """Names of the chosen adapters."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> LoraConfig:
        """Configuration of the first chosen adapter.

        Raises:
            AdapterError: none is chosen.
        """
        if not self.active_adapters:
            raise AdapterError(f"no adapter is active; there are: {', '.join(self.peft_config) or 'none'}.")
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that any adapter trains whole, or None."""
        return {name for one in self.peft_config.values() for name in one.modules_to_save or ()} or None

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers on which any adapter has a pair, in the base's order."""
        parts = [live_parts(self.base_model.handle, name).weights for name in self.peft_config]
        found = {path for one in parts for path, leaves in one.items() if "A" in leaves}
        return [path for path, _ in self.get_base_model().named_modules() if path in found]

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base's type, or None where it does not say."""
        return getattr(self.base_model, "dtype", None)

    def get_base_model(self) -> nn.Module:
        """Return the base, with its adapters on it."""
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many values are trainable, and how many there are, shared ones once."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print a line about the numbers of parameters: the one thing that this library prints, being asked to."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / max(total, 1):.4f}"
        )

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """Return the state of every adapted layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """Return the state of all adapters."""
        return status.get_model_status(self)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a new adapter, which waits, frozen, for `set_adapter`.

        Raises:
            AdapterError: the name is taken. ConfigError, TargetError: as in `LoraModel.add`.
        """
        self.base_model.add(adapter_name, peft_config, autocast=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the adapters that act, and make exactly these trainable; see `LoraModel.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or not; the others stay as they are."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `LoraModel.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Give the base, bit for bit, inside a `with` block, whatever happens inside; merged weights are put aside."""
        return self.base_model.disabled()

    def unload(self) -> nn.Module:
        """Remove all adapters and return the base exactly as it was."""
        return self._without_hook(self.base_model.unload())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge, remove all adapters and return the plain model; see `LoraModel.merge_and_unload`."""
        return self._without_hook(self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters as PEFT does: "default" into the directory itself, others into subdirectories of their names.

        Args:
            safe_serialization: must be True; pickles are not written.
            selected_adapters: their names; by default all.
            save_embedding_layers: "auto" saves the new rows of a resized vocabulary, where the base's configuration is
                on this disk and tells its size; False does not; True, whole embeddings, is refused.
            is_main_process: False writes nothing.
            path_initial_model_for_weight_conversion: must be None; no start here changes the base.
            state_dict: the whole model's state dict to take the tensors from, as the Trainer passes it.
        Raises:
            AdapterError: an unknown name, tensors that are empty or not finite, a directory that cannot be written.
        """
        refuse_embeddings(save_embedding_layers)
        if not safe_serialization:
            raise ConfigError("safe_serialization=False would write a pickle, which is not supported; leave it out.")
        if path_initial_model_for_weight_conversion is not None:
            raise ConfigError(
                "path_initial_model_for_weight_conversion is for starts that rewrite the base; none here does. "
                "Leave it out."
            )
        names = self.base_model.known(list(self.peft_config) if selected_adapters is None else selected_adapters)
        warn_of_unsaved(self.base_model)
        for name in names if is_main_process else ():
            parts = None if state_dict is None else gathered(self.base_model.handle, name, state_dict, ROOT)
            place = Path(save_directory) / ("" if name == "default" else directory_name(name))
            value = value_of(self.base_model, name, parts, new_rows=save_embedding_layers is not False)
            write_adapter(value, place)
        if is_main_process:
            self.create_or_update_model_card(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        torch_device: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Put a saved adapter on a base; the class is the one of its task. The model is in eval mode unless trainable.

        Args:
            model_id: a local directory, or `owner/name` of a repository on the hub, at `revision`.
            config: to be used in place of the directory's own.
            torch_device: without effect; tensors go where their layers are.
        Raises:
            AdapterError: no such directory, files that are broken, or an adapter that does not fit: all findings.
        """
        from sideroad.peft.tasks import class_of  # the classes of the tasks derive from this one

        refuse_options(ephemeral_gpu_offload, key_mapping)
        place = adapter_directory(model_id, subfolder=subfolder, revision=revision, token=token)
        found = read_stored(place, config)
        kind: Any = class_of(found.config, cls)
        with making_room(model, found, is_trainable) as stored:
            wrapped = kind(model, stored, adapter_name, autocast_adapter_dtype, trainable=is_trainable)
        wrapped.peft_config[adapter_name].inference_mode = not is_trainable
        if not is_trainable:
            wrapped.eval()
        return wrapped  # type: ignore[no-any-return]

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> LoadResult:
        """Load a saved adapter, which waits for `set_adapter`; a name that exists gets the tensors, if they fit.

        For a name that exists, a subdirectory of that name comes first, where `save_pretrained` puts it. No
        `requires_grad` changes of any adapter that exists. The model is put in eval mode unless `is_trainable`.

        Raises:
            AdapterError: as in `from_pretrained`; nothing is changed.
            MergeError: an adapter of that name is merged.
        """
        refuse_options(ephemeral_gpu_offload, key_mapping)
        present = adapter_name in self.peft_config
        place = adapter_directory(model_id, subfolder=subfolder, revision=revision, token=token)
        found = read_stored(own_place(place, adapter_name) if present else place)
        with making_room(self.base_model.model, found, is_trainable or present) as stored:
            if present:
                self.base_model.handle.load(adapter_name, stored.value)
            else:
                self.base_model.add(adapter_name, stored, autocast=autocast_adapter_dtype, trainable=is_trainable)
                self.peft_config[adapter_name].inference_mode = not is_trainable
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write README.md with what hubs look for, or bring the one there is up to date."""
        write_card(next(iter(self.peft_config.values()), None), Path(output_dir))

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: nothing here uploads."""
        refuse("push_to_hub")

    def hotswap_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: swapping without recompiling is not here yet."""
        refuse("hotswap_adapter")

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the base's vocabulary, unless an adapter trains the embedding or head: resize before wrapping then."""
        refuse_resizing(attached(self.get_base_model()))
        return self.get_base_model().resize_token_embeddings(*args, **kwargs)  # type: ignore[operator]

    def _without_hook(self, base: nn.Module) -> nn.Module:
        if self._feeds_gradients:
            starve_gradients(base)
        self._feeds_gradients = False
        return base
