"""How the maps of a cache are stored: numbers of a width that the spec names, rounded on the device, and back.

    fp32, fp16   one column of tokens x width numbers
    int8         one column of tokens x width codes, and one, `<map>__steps`, of a step per token in fp16

Input: a branch's maps as the encoder gives them, fp32. Output: arrays as they lie in the table's columns; from those, fp32 again. Invariant: what a
reader gets is what was rounded, whether it was stored in between or not. Centres and scales lie beside the tables, by their digest:

    calibrations/<sha256>.safetensors    `<branch>/<map>/centre` and `.../scale`, fp32 [width]
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from model.quantisation import ChannelCalibration, PackedMap, quantise
from model.specs import FeatureSpec, MapSpec
from model.views import Branch
from workers.errors import MissingFeaturesError, ObjectNotFoundError
from workers.storage import Store

__all__ = [
    "Calibrations",
    "FeatureCodec",
    "RoundedMap",
    "StoredMap",
    "calibration_path",
    "calibrations_to_bytes",
    "read_calibration_file",
    "read_calibrations",
]

Calibrations = Mapping[str, ChannelCalibration]
"""Centres and scales by branch and map, as `local/layer_7`."""


@runtime_checkable
class NewArray(Protocol):
    """Makes an array with whatever is in its memory."""

    def __call__(self, shape: tuple[int, ...], /, dtype: Any) -> np.ndarray:
        """As numpy.empty."""


_NUMPY_DTYPE = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
_TORCH_DTYPE = {"fp32": torch.float32, "fp16": torch.float16}


def calibration_path(sha256: str) -> str:
    """Where centres and scales lie, relative to the root."""
    return f"calibrations/{sha256}.safetensors"


def calibrations_to_bytes(calibrations: Calibrations) -> tuple[bytes, str]:
    """A file of centres and scales, and its digest.

    Args:
        calibrations: by branch and map.

    Returns:
        The file's bytes and their sha256.
    """
    tensors = {}
    for place, calibration in sorted(calibrations.items()):
        tensors[f"{place}/centre"], tensors[f"{place}/scale"] = calibration.centre.contiguous(), calibration.scale.contiguous()
    data = safetensors.torch.save(tensors)
    return data, hashlib.sha256(data).hexdigest()


def read_calibrations(store: Store, spec: FeatureSpec) -> Calibrations:
    """The centres and scales that a spec's maps are stored behind.

    Args:
        store: of the root.
        spec: of the cache.

    Returns:
        Them by branch and map; none where the precision is not int8.

    Raises:
        MissingFeaturesError: the file is gone, or is another one.
    """
    return {} if spec.calibration_sha256 is None else read_calibration_file(store, spec.calibration_sha256)


def read_calibration_file(store: Store, sha256: str) -> dict[str, ChannelCalibration]:
    """A file of centres and scales.

    Args:
        store: of the root.
        sha256: that it is named by.

    Returns:
        Them by branch and map.

    Raises:
        MissingFeaturesError: the file is gone, or is another one.
    """
    path = calibration_path(sha256)
    try:
        data = store.read_bytes(path)
    except ObjectNotFoundError as error:
        raise MissingFeaturesError(
            f"{store.url(path)} is gone: without its centres and scales the int8 features cannot be read. Restore it, or cache again."
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MissingFeaturesError(f"{store.url(path)} does not have the digest that it is named by; restore it, or remove it and cache again")
    tensors = safetensors.torch.load(data)
    places = {name.rpartition("/")[0] for name in tensors}
    return {place: ChannelCalibration(centre=tensors[f"{place}/centre"], scale=tensors[f"{place}/scale"]) for place in places}


@dataclass(frozen=True, kw_only=True)
class StoredMap:
    """One map of some views, as it is stored."""

    values: np.ndarray
    """[views, tokens, width] of the map's precision."""
    steps: np.ndarray | None = None
    """fp16 [views, tokens]; None where the map is not int8."""

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """One for every column of the map."""
        return (self.values,) if self.steps is None else (self.values, self.steps)

    def __getitem__(self, views: slice) -> "StoredMap":
        """The map of some of the views."""
        return StoredMap(values=self.values[views], steps=None if self.steps is None else self.steps[views])


@dataclass(frozen=True, kw_only=True)
class RoundedMap:
    """One map of some views, rounded, where it was computed."""

    values: Tensor
    """[views, tokens, width] of the map's precision."""
    steps: Tensor | None
    """fp16 [views, tokens]; None where the map is not int8."""
    finite: Tensor
    """Per view whether everything that is stored of it is finite: bool [views]."""


class FeatureCodec:
    """Rounds the maps of one cache.

    Args:
        spec: of the cache.
        calibrations: as `read_calibrations` gives them.
    """

    def __init__(self, spec: FeatureSpec, calibrations: Calibrations) -> None:
        self._spec = spec
        self._calibrations = calibrations
        self._on_device: dict[tuple[str, torch.device], ChannelCalibration] = {}

    def empty(self, branch: Branch, item: MapSpec, num_views: int, new: NewArray = np.empty) -> StoredMap:
        """Room for a map of so many views.

        Args:
            branch: of the map.
            item: the map.
            num_views: how many.
            new: makes the arrays.
        """
        precision, tokens = self._spec.stored_as(branch, item), item.num_tokens(self._spec.encoder.num_patches)
        return StoredMap(
            values=new((num_views, tokens, self._spec.encoder.width), dtype=_NUMPY_DTYPE[precision]),
            steps=new((num_views, tokens), dtype=np.float16) if precision == "int8" else None,
        )

    def rounded(self, branch: Branch, item: MapSpec, tokens: Float[Tensor, "views tokens width"]) -> RoundedMap:
        """Round a map on its device, so that few bytes leave it.

        Args:
            branch: of the map.
            item: the map.
            tokens: fp32, as the encoder gives it.

        Returns:
            It, on the same device.
        """
        precision = self._spec.stored_as(branch, item)
        if precision == "int8":
            codes, steps = quantise(tokens, self._calibration(branch, item, tokens.device))
            return RoundedMap(values=codes, steps=steps, finite=torch.isfinite(steps).all(dim=1))
        kept = tokens.to(_TORCH_DTYPE[precision])
        return RoundedMap(values=kept, steps=None, finite=_finite(kept))

    def packed(self, branch: Branch, item: MapSpec, stored: StoredMap) -> PackedMap:
        """A stored map as it travels to its device. Shares the arrays' memory.

        Args:
            branch: of the map.
            item: the map.
            stored: as it was rounded, or as it was read.
        """
        return PackedMap(
            values=torch.from_numpy(stored.values),
            steps=None if stored.steps is None else torch.from_numpy(stored.steps),
            calibration=self.calibration(branch, item),
        )

    def load(self, branch: Branch, item: MapSpec, stored: StoredMap) -> Float[Tensor, "views tokens width"]:
        """A stored map in fp32.

        Args:
            branch: of the map.
            item: the map.
            stored: as it was rounded, or as it was read.
        """
        return self.packed(branch, item, stored).dense()

    def calibration(self, branch: Branch, item: MapSpec) -> ChannelCalibration | None:
        """Of a map, on the CPU; None where it is not int8, and nothing was measured."""
        return self._calibration(branch, item, "cpu") if self._spec.stored_as(branch, item) == "int8" else None

    def _calibration(self, branch: Branch, item: MapSpec, device: torch.device | str) -> ChannelCalibration:
        place = item.place(branch)
        if place not in self._calibrations:
            raise MissingFeaturesError(
                f"the calibration of these features has no centres and scales of {place}, it has those of {sorted(self._calibrations)}; its file "
                "was changed by hand, or made for other maps"
            )
        there = (place, torch.device(device))
        if there not in self._on_device:
            self._on_device[there] = self._calibrations[place].to(device)
        return self._on_device[there]


def _finite(values: Tensor) -> Tensor:
    """Per view whether all of it is finite."""
    return torch.isfinite(values).flatten(1).all(dim=1)
