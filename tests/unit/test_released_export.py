"""What the authors' code does not compute is refused by name, one fault at a time."""

from dataclasses import replace

import pytest

from model.errors import ExportError
from model.released_export import check_computable
from model.specs import (
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SingleSpec,
    TextGuidedSelectorSpec,
)
from model.views import ViewSpec
from tests.tiny_training import tiny_encoder_spec

ENCODER = tiny_encoder_spec(width=1024, num_blocks=24)
FUSION = SingleSpec(layer=23)
GLOBAL = GlobalBranchSpec(fusion=FUSION, adapters=MLPSpec())
LOCAL = LocalBranchSpec(fusion=FUSION, compression=CompressionSpec(queries=144), selector=TextGuidedSelectorSpec())
SLIME = ConnectorSpec(global_branch=GLOBAL, local_branch=LOCAL, standardise_inputs=False)


def test_slime_is_computed():
    check_computable(SLIME, ENCODER, ViewSpec.slime())
    check_computable(replace(SLIME, local_branch=replace(LOCAL, merge="spatial")), ENCODER, ViewSpec.slime())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"standardise_inputs": True}, "train with connector.standardise_inputs = false"),
        ({"global_branch": replace(GLOBAL, fusion=DCISpec(base=23, groups=()))}, "SliME's resamplers read one map, this connector a dci fusion"),
        ({"global_branch": replace(GLOBAL, adapters=GatedMixtureSpec())}, "SliME's gate counts for views of 576 patches alone"),
        ({"global_branch": replace(GLOBAL, output_grid=2)}, "resizes no grid"),
        ({"local_branch": replace(LOCAL, compression=CompressionSpec(queries=20))}, "SliME's queries form a square grid, 20 do not"),
        ({"local_branch": replace(LOCAL, selector=LearnableSelectorSpec())}, "cosine selector has no weights"),
        ({"local_branch": replace(LOCAL, selector=TextGuidedSelectorSpec(reduce="mean"))}, "sums over the text"),
        ({"local_branch": replace(LOCAL, projector="own")}, "one projector for global and local views"),
        ({"local_branch": replace(LOCAL, fusion=SingleSpec(layer=22))}, "fuses global and local views alike"),
        ({"local_branch": replace(LOCAL, merge="spatial", newline=True)}, "spatial merge has no newline token"),
        ({"local_branch": replace(LOCAL, merge="spatial_unpad", newline=True)}, "SliME's code merges flat or spatial"),
    ],
)
def test_one_fault_is_told(changes, fault):
    with pytest.raises(ExportError, match="not one that the authors' code computes: ") as refused:
        check_computable(replace(SLIME, **changes), ENCODER, ViewSpec.slime())
    assert fault in str(refused.value)


def test_views_that_their_code_would_cut_otherwise_are_told():
    for views in (ViewSpec.slime(max_slices=4), ViewSpec.slime_paper(), ViewSpec.anyres()):
        with pytest.raises(ExportError, match="SliME's code cuts views by its own rule alone"):
            check_computable(SLIME, ENCODER, views)


def test_all_faults_are_told_at_once():
    several = replace(SLIME, standardise_inputs=True, local_branch=replace(LOCAL, projector="own", compression=CompressionSpec(queries=20)))
    with pytest.raises(ExportError) as refused:
        check_computable(several, ENCODER, ViewSpec.slime())
    assert str(refused.value).count("; ") >= 2
    assert all(fault in str(refused.value) for fault in ("standardise_inputs", "one projector", "square grid"))
