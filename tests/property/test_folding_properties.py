"""Over every connector that folds: two linear layers on the needed hidden states give the connector's tokens."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model.connector import build_connector
from model.folding import fold_connector
from model.specs import ConnectorSpec, DCISpec, GlobalBranchSpec, LocalBranchSpec, MLPSpec, SCISpec, SingleSpec
from tests.drawn_fusions import dci_fields, sparse_fields
from tests.tiny_training import tiny_encoder_spec

LAYERS = st.integers(0, 6)
# Built in the test and not here: the type checker looks at items by chance, which Hypothesis does not want of what it draws.
FUSIONS = st.one_of(
    st.tuples(st.just(SingleSpec), st.fixed_dictionaries({"layer": LAYERS})),
    st.tuples(st.just(SCISpec), sparse_fields(6, 3)),
    st.tuples(st.just(DCISpec), dci_fields(6, 3)),
)


@settings(max_examples=60, deadline=None)
@given(drawn=FUSIONS, local=st.booleans(), standardise=st.booleans(), seed=st.integers(0, 2**16), images=st.integers(1, 3))
def test_a_folded_projector_gives_the_connector_s_tokens(drawn, local, standardise, seed, images):
    kind, values = drawn
    fusion = kind(**values)
    branch = LocalBranchSpec(fusion=fusion, compression=None, merge="spatial_unpad", newline=True) if local else None
    spec = ConnectorSpec(
        global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=branch, separator=None, standardise_inputs=standardise
    )
    generator = torch.Generator().manual_seed(seed)
    connector = build_connector(spec, tiny_encoder_spec(), hidden=16, embedding_rms=0.03, seed=seed)
    # One channel never varies, one is large: as real hidden states have them.
    states = torch.randn(7, images + 2, 16, 8, generator=generator) * torch.tensor([0.0, 50.0, *[1.0] * 6]) + 2
    maps = {map_spec.name: states[list(map_spec.layers)].mean(dim=0) for map_spec in fusion.maps}
    first = {name: tokens[:images] for name, tokens in maps.items()}
    connector.measure_inputs(first, {name: tokens[images:] for name, tokens in maps.items()} if local else None)
    folded = fold_connector(connector)
    assert list(folded.layers) == sorted({layer for map_spec in fusion.maps for layer in map_spec.layers})
    side_by_side = torch.cat([states[layer] for layer in folded.layers], dim=-1)
    tokens = F.linear(F.gelu(F.linear(side_by_side, folded.weight_1, folded.bias_1)), folded.weight_2, folded.bias_2)
    with torch.no_grad():
        wanted = connector.global_tokens(maps)
        # The worst of 2000 such draws was 8.1e-7 of the largest token.
        assert torch.allclose(tokens, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
        if local:
            assert torch.equal(connector.local_tokens(maps), wanted)
            assert torch.equal(folded.newline, connector.newline_token()[0])
