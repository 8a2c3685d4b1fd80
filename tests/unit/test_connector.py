import pytest
import torch

from model.adapters import Projector
from model.compression import Resampler, own_cells
from model.connector import Connector
from model.errors import MissingMapError, SpecError
from model.specs import CompressionSpec, ConnectorSpec, DCISpec, GatedMixtureSpec, GlobalBranchSpec, LocalBranchSpec, MLPSpec, SingleSpec


def tiny_connector_spec(**changes):
    fusion = DCISpec(base=5, groups=((0, 2), (3, 5)))
    values = {
        "global_branch": GlobalBranchSpec(fusion=fusion, adapters=GatedMixtureSpec()),
        "local_branch": LocalBranchSpec(fusion=fusion, compression=CompressionSpec(queries=4)),
    }
    return ConnectorSpec(**(values | changes))


def build(spec=None, *, embedding_rms=0.02, seed=0):
    return Connector(
        spec or tiny_connector_spec(),
        encoder_width=8,
        num_patches=16,
        hidden=12,
        embedding_rms=embedding_rms,
        generator=torch.Generator().manual_seed(seed),
    )


def features(count, *, seed=1, names=("layer_5", "mean_0_2", "mean_3_5")):
    generator = torch.Generator().manual_seed(seed)
    return {name: 3 + 2 * torch.randn(count, 16, 8, generator=generator) for name in names}


def test_a_seed_gives_the_same_bytes():
    one, two, other = build(seed=1), build(seed=1), build(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_tokens_start_in_the_scale_of_the_embeddings():
    for rms in (0.02, 1.0):
        connector = build(embedding_rms=rms)
        connector.measure_inputs(features(50), features(90, seed=2))
        for tokens in (connector.global_tokens(features(50), experts="mlp"), connector.local_tokens(features(90, seed=2))):
            assert tokens.square().mean().sqrt().item() == pytest.approx(rms, rel=0.5)


@pytest.mark.parametrize("rms", [0.02, 1.0])
def test_started_as_the_authors_do_tokens_have_the_scale_that_torch_gives_them(rms):
    fusion = DCISpec(base=5, groups=((0, 2), (3, 5)))
    local = LocalBranchSpec(fusion=fusion, compression=None, projector="own", merge="spatial", newline=True)
    branch = GlobalBranchSpec(fusion=fusion, adapters=MLPSpec())
    connector = Connector(
        ConnectorSpec(global_branch=branch, local_branch=local, standardise_inputs=False, start="authors"),
        encoder_width=32,
        num_patches=16,
        hidden=512,
        embedding_rms=rms,
        generator=torch.Generator().manual_seed(0),
    )
    for projector in (connector.global_mlp, connector.local_mlp):
        for linear in (projector.linear_1, projector.linear_2):  # uniform within 1 / sqrt(inputs), weights and biases alike
            bound = linear.in_features**-0.5
            for values in (linear.weight, linear.bias):
                assert 0.97 * bound < values.abs().max().item() <= bound
                assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    newline = connector.newline_token()[0]
    assert newline.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert connector.token_scale.item() == 1
    generator = torch.Generator().manual_seed(1)
    maps = {name: torch.randn(2, 16, 32, generator=generator) for name in ("layer_5", "mean_0_2", "mean_3_5")}
    expected = connector.global_mlp(torch.cat([maps[name] for name in ("layer_5", "mean_0_2", "mean_3_5")], dim=-1))
    torch.testing.assert_close(connector.global_tokens(maps), expected, atol=0, rtol=0)


def test_standardisation_folds_into_the_first_layer():
    connector = build(tiny_connector_spec(global_branch=GlobalBranchSpec(fusion=DCISpec(base=5, groups=((0, 2), (3, 5))), adapters=MLPSpec())))
    connector.measure_inputs(features(50), features(50))
    tokens = connector.fuse_global(features(2, seed=7))
    folded = Projector(24, 12, torch.Generator())
    folded.load_state_dict(connector.global_mlp.state_dict())
    with torch.no_grad():
        first = connector.global_mlp.linear_1
        folded.linear_1.weight.copy_(first.weight * connector.global_input.scale)
        folded.linear_1.bias.copy_(first.bias - folded.linear_1.weight @ connector.global_input.mean)
        folded.linear_2.weight *= connector.token_scale
        folded.linear_2.bias *= connector.token_scale
    torch.testing.assert_close(folded(tokens), connector.global_tokens(features(2, seed=7)), atol=1e-6, rtol=1e-4)


def test_each_branch_is_standardised_by_its_own_features():
    connector = build()
    global_maps, local_maps = features(50), {name: 5 * value - 7 for name, value in features(90, seed=2).items()}
    connector.measure_inputs(global_maps, local_maps)
    for standardised in (connector.global_input(connector.fuse_global(global_maps)), connector.local_input(connector.fuse_local(local_maps))):
        flat = standardised.reshape(-1, standardised.shape[-1])
        torch.testing.assert_close(flat.mean(dim=0), torch.zeros(24), atol=1e-5, rtol=0)
        torch.testing.assert_close(flat.std(dim=0, correction=0), torch.ones(24), atol=1e-5, rtol=0)
    with pytest.raises(MissingMapError, match="local branch needs local maps"):
        connector.measure_inputs(global_maps, None)


def test_a_channel_that_never_varies_does_not_explode():
    connector = build()
    constant = {name: torch.ones_like(value) for name, value in features(4).items()}
    connector.measure_inputs(constant, constant)
    assert torch.isfinite(connector.global_tokens(features(2))).all()


def test_standardisation_can_be_left_out():
    connector = build(tiny_connector_spec(standardise_inputs=False))
    connector.measure_inputs(features(4), features(4))
    assert connector.global_input.mean.abs().sum() == 0


def test_experts_are_chosen_and_mixed():
    connector = build()
    maps = features(2)
    one, two, mixed = (connector.global_tokens(maps, experts=e) for e in ("mlp", "resampler", "mixture"))
    torch.testing.assert_close(mixed, (one + two) / 2)  # the gate starts at a half each
    assert not torch.equal(one, two)


def test_shared_and_own_projector():
    shared = build()
    assert shared.local_mlp is None
    spec = tiny_connector_spec(
        local_branch=LocalBranchSpec(fusion=SingleSpec(layer=5), compression=CompressionSpec(queries=4), projector="own"),
    )
    own = build(spec)
    assert own.local_mlp is not None
    assert own.local_tokens(features(3)).shape == (3, 4, 12)
    assert [name for name, _ in own.named_children()][:2] == ["global_input", "global_mlp"]


def test_without_a_local_branch():
    connector = build(tiny_connector_spec(local_branch=None))
    assert connector.tokens_per_local_view == 0
    with pytest.raises(MissingMapError, match="no local branch"):
        connector.local_tokens(features(1))


def test_permuting_the_batch_permutes_the_tokens():
    connector = build()
    maps = features(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    for function in (connector.global_tokens, connector.local_tokens):
        torch.testing.assert_close(function({k: v[order] for k, v in maps.items()}), function(maps)[order], atol=1e-6, rtol=1e-5)


POSITIONAL = [
    ((4, 4), 64, 576), ((8, 8), 64, 576), ((4, 4), 64, 192), ((2, 2), 16, 32), ((4, 4), 16, 96), ((4, 4), 16, 24),
    ((4, 5), 64, 192), ((2, 3), 16, 96), ((1, 5), 64, 192),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "patches", "width"), POSITIONAL)
def test_positional_queries_start_at_their_own_cell(queries, patches, width):
    generator = torch.Generator().manual_seed(0)
    resampler = Resampler(query_grid=queries, num_patches=patches, width=width, attention_init="positional", generator=generator)
    tokens = torch.randn(3, patches, width, generator=generator)
    own = own_cells(queries, round(patches**0.5))[None] == torch.arange(resampler.num_queries)[:, None]
    attention = resampler.attention(tokens)
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert (attention * own).sum(-1).min() > 0.6
    # So a query is, but for a norm, close to the mean of its cell's normalised tokens.
    normed = torch.nn.functional.layer_norm(tokens, (width,))
    means = torch.einsum("qp,bpw->bqw", own / own.sum(-1, keepdim=True), normed)
    agreement = torch.cosine_similarity(resampler(tokens), means, dim=-1)
    assert agreement.mean() > 0.8


def test_authors_start_is_not_positional():
    resampler = Resampler(query_grid=(4, 4), num_patches=64, width=192, attention_init="authors", generator=torch.Generator().manual_seed(0))
    own = own_cells((4, 4), 8)[None] == torch.arange(16)[:, None]
    tokens = torch.randn(2, 64, 192, generator=torch.Generator().manual_seed(1))
    assert (resampler.attention(tokens) * own).sum(-1).mean() < 0.4


def test_both_ways_of_summing_agree():
    resampler = Resampler(query_grid=(4, 4), num_patches=16, width=256, attention_init="positional", generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(1))
    outputs = []
    for resampler.regrouped in (True, False):
        outputs.append(resampler(tokens))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_resampler_refuses_what_has_no_grid():
    with pytest.raises(SpecError, match="square grid of patches, found 15"):
        Resampler(query_grid=(2, 3), num_patches=15, width=32, attention_init="authors", generator=torch.Generator())
    with pytest.raises(SpecError, match="multiple of 4"):
        Resampler(query_grid=(2, 2), num_patches=16, width=30, attention_init="authors", generator=torch.Generator())


def test_every_parameter_of_the_mixture_gets_a_gradient():
    connector = build()
    noise = torch.randn(2, 16, 2, generator=torch.Generator().manual_seed(0))
    connector.global_tokens(features(2), noise=noise).square().sum().backward()
    connector.local_tokens(features(2)).pow(3).sum().backward()
    silent = [name for name, parameter in connector.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum() > 0]
    assert silent == []
