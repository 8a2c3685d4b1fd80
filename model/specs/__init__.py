"""What bears identity: frozen specs, and the one function that turns a spec into a fingerprint.

A spec says *what* is computed; how (workers, batch rows on a device, buckets, prices) never enters a spec. Two specs with the same fingerprint
promise the same result. Needs the standard library alone, so a node plans without loading torch.

Vocabulary of dimensions, used in every annotation: batch views layers patches width queries experts text hidden.

Layer numbering, defined here and nowhere else: 0 = embedding output, k = output of block k.
"""

from model.specs._connectors import (
    BLOCKS,
    CONNECTOR_BLOCKS,
    AdapterSpec,
    Block,
    CompressionSpec,
    ConnectorSpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    Merge,
    MLPSpec,
    SelectorSpec,
    Start,
    TextGuidedSelectorSpec,
)
from model.specs._exports import ExportForm, StockForm
from model.specs._features import (
    CalibrationRule,
    CalibrationSpec,
    Compute,
    EncoderFamily,
    EncoderSpec,
    EncodingSpec,
    FeatureOrigin,
    FeatureSpec,
    MapSpec,
    Precision,
    deepest_layer,
)
from model.specs._fingerprints import UnknownDigest, canonical_json, fingerprint, fingerprint_if_known, spec_differences
from model.specs._fusions import DCISpec, FusionSpec, SCISpec, SingleSpec, STISpec
from model.specs._language_models import ChatTemplate, LanguageModelSpec, LoraSpec
from model.specs._schedules import BranchMix, PhaseSpec, ScheduleSpec, sees_text_only

__all__ = [
    "BLOCKS",
    "CONNECTOR_BLOCKS",
    "AdapterSpec",
    "Block",
    "BranchMix",
    "CalibrationRule",
    "CalibrationSpec",
    "ChatTemplate",
    "CompressionSpec",
    "Compute",
    "ConnectorSpec",
    "DCISpec",
    "EncoderFamily",
    "EncoderSpec",
    "EncodingSpec",
    "ExportForm",
    "FeatureOrigin",
    "FeatureSpec",
    "FusionSpec",
    "GatedMixtureSpec",
    "GlobalBranchSpec",
    "LanguageModelSpec",
    "LearnableSelectorSpec",
    "LocalBranchSpec",
    "LoraSpec",
    "MLPSpec",
    "MapSpec",
    "Merge",
    "PhaseSpec",
    "Precision",
    "SCISpec",
    "STISpec",
    "ScheduleSpec",
    "SelectorSpec",
    "SingleSpec",
    "Start",
    "StockForm",
    "TextGuidedSelectorSpec",
    "UnknownDigest",
    "canonical_json",
    "deepest_layer",
    "fingerprint",
    "fingerprint_if_known",
    "sees_text_only",
    "spec_differences",
]
