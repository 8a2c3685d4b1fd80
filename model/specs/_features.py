"""Encoders, the maps that are read off them, and the identity of a feature cache."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from model.errors import SpecError
from model.views import ViewSpec

__all__ = [
    "CalibrationRule",
    "CalibrationSpec",
    "Compute",
    "EncoderFamily",
    "EncoderSpec",
    "EncodingSpec",
    "FeatureOrigin",
    "FeatureSpec",
    "MapSpec",
    "Precision",
    "check_map_pool",
    "deepest_layer",
]

EncoderFamily = Literal["clip", "siglip", "siglip2", "dinov2", "dinov2_with_registers"]
"""Whose architecture an encoder has. SigLIP 2 at a fixed resolution is `siglip`, by its own config; `siglip2` is the NaFlex one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MapSpec:
    """A named, parameter-free reduction of the encoder's hidden states: one layer, or the mean of several; of each patch, or of squares of patches.

    Raises:
        SpecError: no layers, a negative one, layers out of order, or squares of no patches.
    """

    layers: tuple[int, ...]
    """Hidden-state indices, ascending. One index is the layer itself; several are their mean, accumulated in fp32."""
    pool: int = 1
    """Side of the squares of patches whose mean becomes one token, 2 for a quarter of the tokens; 1 keeps every patch."""

    def __post_init__(self) -> None:
        if not self.layers or self.layers[0] < 0 or any(a >= b for a, b in pairwise(self.layers)):
            raise SpecError(f"a map needs ascending layer numbers from 0 up, found {list(self.layers)}")
        if self.pool < 1:
            raise SpecError(f"a map's pool is the side of a square of patches, from 1 up, found {self.pool}")

    @property
    def name(self) -> str:
        """Column name in the tables: `layer_7`, `mean_0_11` for a contiguous run, `mean_0.4.8` else; with a pool, `layer_7_pool_2`."""
        first, last = self.layers[0], self.layers[-1]
        pooled = "" if self.pool == 1 else f"_pool_{self.pool}"
        if len(self.layers) == 1:
            return f"layer_{first}{pooled}"
        if last - first + 1 == len(self.layers):
            return f"mean_{first}_{last}{pooled}"
        return f"mean_{'.'.join(str(layer) for layer in self.layers)}{pooled}"

    def place(self, branch: Literal["global", "local"]) -> str:
        """The map of a branch's views, as calibrations, quality and errors name it: `local/layer_7`."""
        return f"{branch}/{self.name}"

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of the map of one view.

        Args:
            num_patches: patches in a view.
        """
        return num_patches // self.pool**2


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """A frozen vision encoder: which weights, and the shape of what comes out."""

    model: str
    """Folder or hub id: where it is loaded from. Part of the identity too, so the same weights in another place are another encoder."""
    weights_sha256: str
    family: EncoderFamily
    view_px: int
    patch_px: int
    width: int
    num_blocks: int
    prefix_tokens: int
    """Tokens before the patches, removed from every map: 1 (CLS) for CLIP and DINOv2, registers besides where there are some, 0 for SigLIP."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_heads: int
    mlp_width: int
    activation: str
    norm_eps: float

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """The mean as a colour of 0 to 255, rounded down as LLaVA's code does: what a padded global view is filled up with."""
        red, green, blue = (int(255 * value) for value in self.mean)
        return red, green, blue

    @property
    def grid(self) -> int:
        """Patches on a side. Pixels behind the last whole patch are seen by none: 6 of SigLIP-SO400M/14's 384."""
        return self.view_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches in a view."""
        return self.grid**2


Precision = Literal["fp32", "fp16", "int8"]
"""How a map's numbers are stored. `int8`: per token, behind a centre and a scale per channel, see model.quantisation."""

Compute = Literal["fp32", "bf16", "fp16"]
"""In which type an encoder's weights and hidden states are held. Maps are summed and pooled in fp32 whatever it is."""

FeatureOrigin = Literal["cached", "global_cached", "live"]
"""Where training has features from. `live`: every view is encoded whenever it is seen. `global_cached`: local views are, features of global ones are
stored."""

_BYTES_PER_NUMBER = {"fp32": 4, "fp16": 2, "int8": 1}
_STEP_BYTES = 2
"""Of int8: each token's step, in fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRule:
    """How maps are measured for int8, and when it is not good enough for one.

    Raises:
        SpecError: too few images.
    """

    num_images: int
    """Drawn evenly; three of four are measured, the fourth says how good the measure is on images that it has not seen."""
    min_snr_db: float
    """A map that int8 keeps less of, in decibels, is stored in fp16."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images < 4:
            raise SpecError(f"features.calibration_images: found {self.num_images}; allowed: at least 4, of which one checks what three measure")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingSpec:
    """What the numbers of a map depend on beside the image: caches of one encoding share a table, whatever dataset and maps each is of.

    Raises:
        SpecError: int8 without a rule, or a rule without int8.
    """

    encoder: EncoderSpec
    views: ViewSpec
    precision: Precision
    compute: Compute
    calibration: CalibrationRule | None
    """Of int8 alone."""
    resampling: Literal["bicubic"] = "bicubic"
    format_version: int = 2

    def __post_init__(self) -> None:
        if (self.calibration is None) == (self.precision == "int8"):
            raise SpecError(f"features of precision {self.precision} with the calibration {self.calibration}: int8 needs one, nothing else has one")


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSpec:
    """Identity of a calibration: centres and scales of maps, measured on some images of a dataset, and which maps int8 is good enough for."""

    dataset_fingerprint: str
    encoding: EncodingSpec
    global_maps: tuple[MapSpec, ...]
    local_maps: tuple[MapSpec, ...]

    def maps(self, branch: Literal["global", "local"]) -> tuple[MapSpec, ...]:
        """The maps that are measured on the views of a branch."""
        return self.global_maps if branch == "global" else self.local_maps


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpec:
    """Identity of a feature cache: the same spec gives the same rows, another spec another table."""

    dataset_fingerprint: str
    encoder: EncoderSpec
    views: ViewSpec
    global_maps: tuple[MapSpec, ...]
    local_maps: tuple[MapSpec, ...]
    precision: Precision = "fp16"
    calibration: CalibrationRule | None = None
    """Of int8: how its maps are measured."""
    calibration_sha256: str | None = None
    """Of int8: digest of the file of centres and scales."""
    fp16_maps: tuple[str, ...] = ()
    """Of int8: maps that it is not good enough for, as `local/layer_7`."""
    compute: Compute = "fp32"
    """Of the forward pass. It changes the numbers that are stored, so it is part of the identity."""
    resampling: Literal["bicubic"] = "bicubic"
    format_version: int = 2

    @property
    def encoding(self) -> EncodingSpec:
        """What decides which table the features lie in."""
        return EncodingSpec(
            encoder=self.encoder,
            views=self.views,
            precision=self.precision,
            compute=self.compute,
            calibration=self.calibration,
            resampling=self.resampling,
            format_version=self.format_version,
        )

    def maps(self, branch: Literal["global", "local"]) -> tuple[MapSpec, ...]:
        """The maps stored for the views of a branch."""
        return self.global_maps if branch == "global" else self.local_maps

    def only(self, branch: Literal["global", "local"]) -> "FeatureSpec":
        """The same features of one branch alone."""
        return replace(
            self,
            global_maps=self.global_maps if branch == "global" else (),
            local_maps=self.local_maps if branch == "local" else (),
            fp16_maps=tuple(place for place in self.fp16_maps if place.startswith(f"{branch}/")),
        )

    def cached(self, source: FeatureOrigin) -> "FeatureSpec | None":
        """What of the features is stored; None where nothing is.

        Args:
            source: where those of a training come from.
        """
        match source:
            case "cached":
                return self
            case "global_cached":
                return self.only("global")
            case "live":
                return None

    def unpacked(self) -> "FeatureSpec":
        """The same features where nothing is stored and no calibration is needed: of int8 in fp16, of another precision as they are."""
        return replace(self, precision="fp16", calibration=None, calibration_sha256=None, fp16_maps=()) if self.precision == "int8" else self

    def stored_as(self, branch: Literal["global", "local"], item: MapSpec) -> Precision:
        """How a map of a branch is stored."""
        return "fp16" if item.place(branch) in self.fp16_maps else self.precision

    @property
    def deepest_layer(self) -> int:
        """The highest layer that any map needs; no block behind it runs."""
        return deepest_layer((*self.global_maps, *self.local_maps))

    @property
    def branch_maps(self) -> tuple[tuple[Literal["global", "local"], MapSpec], ...]:
        """Every map with its branch, global ones first."""
        return (*(("global", item) for item in self.global_maps), *(("local", item) for item in self.local_maps))

    def value_bytes(self, branch: Literal["global", "local"], item: MapSpec) -> int:
        """Bytes of one map of one view, without steps: tokens x width x bytes per number."""
        return item.num_tokens(self.encoder.num_patches) * self.encoder.width * _BYTES_PER_NUMBER[self.stored_as(branch, item)]

    def step_bytes(self, branch: Literal["global", "local"], item: MapSpec) -> int:
        """Bytes of the steps of one map of one view; 0 of a map that is not int8."""
        return item.num_tokens(self.encoder.num_patches) * _STEP_BYTES if self.stored_as(branch, item) == "int8" else 0

    def view_bytes(self, branch: Literal["global", "local"]) -> int:
        """Bytes of all maps of one view of a branch."""
        return sum(self.value_bytes(branch, item) + self.step_bytes(branch, item) for item in self.maps(branch))

    def __post_init__(self) -> None:
        is_int8 = self.precision == "int8"
        if is_int8 in (self.calibration_sha256 is None, self.calibration is None) or (self.fp16_maps and not is_int8):
            raise SpecError(
                f"features of precision {self.precision} with the calibration {self.calibration}, its digest {self.calibration_sha256} and fp16 maps "
                f"{list(self.fp16_maps)}: int8 needs a calibration, and nothing else has one"
            )
        for branch, maps in (("global", self.global_maps), ("local", self.local_maps)):
            for map_spec in maps:
                if map_spec.layers[-1] > self.encoder.num_blocks:
                    raise SpecError(
                        f"the {branch} map {map_spec.name} needs layer {map_spec.layers[-1]}, but {self.encoder.model} has layers "
                        f"0..{self.encoder.num_blocks}; choose layers within"
                    )
                check_map_pool(f"the {branch} map {map_spec.name}", map_spec.pool, self.encoder)


def deepest_layer(maps: Iterable[MapSpec]) -> int:
    """The highest layer that any of some maps needs; 0 of none.

    Args:
        maps: of any branches.
    """
    return max([0, *(item.layers[-1] for item in maps)])  # not max(..., default=0): torch.compile, which sees this too, does not know it


def check_map_pool(place: str, pool: int, encoder: EncoderSpec) -> None:
    """Refuse squares of patches that do not tile an encoder's grid.

    Args:
        place: what the message calls it.
        pool: side of the squares.
        encoder: whose grid.

    Raises:
        SpecError: they do not; the message lists those that do.
    """
    if encoder.grid % pool:
        divisors = [side for side in range(1, encoder.grid + 1) if encoder.grid % side == 0]
        raise SpecError(
            f"{place}: found squares of {pool} x {pool} patches, which do not tile the {encoder.grid} x {encoder.grid} of {encoder.model}; allowed: "
            f"one of {divisors}"
        )
