"""The connector's parts against references written in plain loops from the papers' facts. Worst differences seen, on CPU in fp32, are below 2e-6."""

import math
from dataclasses import replace

import pytest
import torch

from model.adapters import Gate, Projector, resized_grid
from model.compression import Resampler, positions_2d
from model.connector import build_connector
from model.fusion import fuse
from model.specs import ConnectorSpec, DCISpec, GlobalBranchSpec, MapSpec, MLPSpec, SCISpec, SingleSpec, STISpec
from tests.tiny_training import tiny_encoder_spec

TOLERANCE = 1e-5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sti_pools_the_flattened_raster():
    spec = STISpec(base=5, layers=(2, 3), pool=8)
    maps = {m.name: random(2, 20, 4, seed=i) for i, m in enumerate(spec.maps)}
    expected = []
    for b in range(2):
        tokens = [maps["layer_5"][b, t] for t in range(20)]
        for name in ("layer_2", "layer_3"):
            tokens += [sum(maps[name][b, group * 8 + k] for k in range(8)) / 8 for group in range(20 // 8)]
        expected.append(torch.stack(tokens))
    torch.testing.assert_close(fuse(maps, spec), torch.stack(expected), atol=TOLERANCE, rtol=0)


def test_sti_pools_patches_of_the_grid():
    """Rows times columns: a pool that is higher than wide is another one than one that is wider than high."""
    spec = STISpec(base=1, layers=(0,), pool=(2, 3))
    maps = {"layer_1": random(1, 36, 4), "layer_0": random(1, 36, 4, seed=1)}
    pooled = []
    for top in range(0, 6, 2):
        for left in range(0, 6, 3):
            cells = [maps["layer_0"][0, (top + y) * 6 + left + x] for y in range(2) for x in range(3)]
            pooled.append(sum(cells) / 6)
    expected = torch.stack([*maps["layer_1"][0], *pooled])[None]
    torch.testing.assert_close(fuse(maps, spec), expected, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(fuse(maps, replace(spec, pool=(3, 2))), expected)


def test_sci_and_dci_put_the_base_first_and_channels_side_by_side():
    states = [random(1, 4, 3, seed=k) for k in range(6)]
    sci = SCISpec(base=5, layers=(1, 3))
    maps = {f"layer_{k}": states[k] for k in range(6)}
    for t in range(4):
        assert fuse(maps, sci)[0, t].tolist() == [*states[5][0, t].tolist(), *states[1][0, t].tolist(), *states[3][0, t].tolist()]
    dci = DCISpec(base=5, groups=((0, 2), (3, 5)))
    means = {MapSpec(layers=(5,)).name: states[5], "mean_0_2": sum(states[:3]) / 3, "mean_3_5": sum(states[3:]) / 3}
    fused = fuse(means, dci)
    for t in range(4):
        for c in range(3):
            assert fused[0, t, 3 + c].item() == pytest.approx((states[0] + states[1] + states[2])[0, t, c].item() / 3, abs=1e-6)
            assert fused[0, t, c].item() == states[5][0, t, c].item()


def test_projector_is_linear_exact_gelu_linear():
    projector = Projector(5, 7, torch.Generator().manual_seed(0))
    x = random(3, 5)
    for row in range(3):
        inner = [
            sum(projector.linear_1.weight[j, i].item() * x[row, i].item() for i in range(5)) + projector.linear_1.bias[j].item() for j in range(7)
        ]
        inner = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner]
        outer = [sum(projector.linear_2.weight[j, i].item() * inner[i] for i in range(7)) + projector.linear_2.bias[j].item() for j in range(7)]
        assert projector(x)[row].tolist() == pytest.approx(outer, abs=TOLERANCE)


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (1, 4), (4, 1)])
def test_positions_put_the_horizontal_axis_first(rows, columns):
    table = positions_2d(rows, columns, 8)
    assert len(table) == rows * columns
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place in (column, row):
                for function in (math.sin, math.cos):
                    expected += [function(place / 10000 ** (k / 2)) for k in range(2)]
            assert table[row * columns + column].tolist() == pytest.approx(expected, abs=1e-6)


def layer_norm(vector, weight, bias):
    values = vector.tolist()
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    normed = torch.tensor([(v - mean) / math.sqrt(variance + 1e-6) for v in values], dtype=torch.float64)
    return normed * weight + (0 if bias is None else bias)


def slow_resampler(resampler, tokens, heads):
    """Query by query, head by head, in double precision."""
    r = {name: value.double() for name, value in [*resampler.named_parameters(), *resampler.named_buffers()]}
    patches, per_head = len(tokens), tokens.shape[1] // heads
    keys = [r["to_keys.weight"] @ (layer_norm(tokens[p], r["norm_keys.weight"], None) + r["key_places"][p]) for p in range(patches)]
    values = [layer_norm(tokens[p], r["norm_values.weight"], r["norm_values.bias"]) for p in range(patches)]
    values = [r["to_values.weight"] @ value + r["to_values.bias"] for value in values]
    expected = []
    for q in range(len(r["queries"])):
        query = layer_norm(r["queries"][q], r["norm_queries.weight"], r["norm_queries.bias"]) + r["query_places"][q]
        query = r["to_queries.weight"] @ query + r["to_queries.bias"]
        parts = []
        for head in range(heads):
            part = slice(head * per_head, (head + 1) * per_head)
            logits = [float(query[part] @ keys[p][part]) / math.sqrt(per_head) for p in range(patches)]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            parts.append(sum(w / sum(weights) * values[p][part] for p, w in enumerate(weights)))
        merged = r["to_output.weight"] @ torch.cat(parts) + r["to_output.bias"]
        expected.append(layer_norm(merged, r["norm_output.weight"], r["norm_output.bias"]))
    return torch.stack(expected)


# (queries, patches, width, heads): CLIP-L's 24 x 24 and 12 x 12 of 1024 in 8 heads, at a sixth of the grid and a quarter of the width; SigLIP's;
# three maps side by side; queries in a grid that is no square, of more and of fewer cells a side than there are patches.
SHAPES = [
    ((4, 4), 16, 256, 2),
    ((2, 2), 16, 256, 2),
    ((3, 3), 36, 288, 2),
    ((2, 2), 16, 768, 6),
    ((2, 3), 16, 256, 2),
    ((1, 7), 16, 256, 2),
]


@pytest.mark.parametrize("regrouped", [True, False])
@pytest.mark.parametrize("start", ["positional", "authors"])
@pytest.mark.parametrize(("queries", "patches", "width", "heads"), SHAPES)
def test_resampler(regrouped, start, queries, patches, width, heads):
    resampler = Resampler(query_grid=queries, num_patches=patches, width=width, attention_init=start, generator=torch.Generator().manual_seed(3))
    resampler.regrouped = regrouped
    with torch.no_grad():
        for number, parameter in enumerate(resampler.parameters()):
            parameter.add_(random(*parameter.shape, seed=number), alpha=0.01)  # away from an initialisation that might hide a mistake
    tokens = random(1, patches, width, seed=9)
    assert resampler.num_heads == heads
    assert resampler(tokens).shape == (1, math.prod(queries), width)
    with torch.no_grad():
        expected = slow_resampler(resampler, tokens[0], heads).float()
        error = (resampler(tokens)[0] - expected).abs().max().item()
    assert error <= TOLERANCE, error


@pytest.mark.parametrize("own_noise", [True, False])
def test_gate(own_noise):
    """The noise's deviation comes from a matrix of its own, or, as in the authors' code, from the gate's."""
    gate = Gate(4, own_noise=own_noise)
    with torch.no_grad():
        gate.weight.copy_(random(4, 2, seed=1))
        if own_noise:
            gate.noise_weight.copy_(random(4, 2, seed=2))
    spreads = gate.noise_weight if own_noise else gate.weight
    x, noise = random(1, 3, 4, seed=3), random(1, 3, 2, seed=4)
    for token in range(3):
        logits = []
        for expert in range(2):
            clean = sum(x[0, token, i].item() * gate.weight[i, expert].item() for i in range(4))
            spread = sum(x[0, token, i].item() * spreads[i, expert].item() for i in range(4))
            logits.append(clean + noise[0, token, expert].item() * (math.log1p(math.exp(spread)) + 0.01))
        total = sum(math.exp(v) for v in logits)
        assert gate(x, noise)[0, token].tolist() == pytest.approx([math.exp(v) / total for v in logits], abs=1e-6)
    assert Gate(4)(x)[0].tolist() == [[0.5, 0.5]] * 3


def test_the_efficient_variant_resizes_behind_the_projector():
    """Interpolating in front of it is cheaper and something else: the projector is not linear."""
    encoder = tiny_encoder_spec(width=8)
    branch = GlobalBranchSpec(fusion=SingleSpec(layer=5), adapters=MLPSpec(), output_grid=2)
    spec = ConnectorSpec(global_branch=branch, local_branch=None, standardise_inputs=False)
    connector = build_connector(spec, encoder, hidden=6, embedding_rms=0.5, seed=0)
    maps = {"layer_5": 3 * random(2, 16, 8)}
    tokens = connector.global_mlp(maps["layer_5"]) * connector.token_scale
    expected = torch.stack(
        [
            torch.stack([sum(view[(2 * y + dy) * 4 + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)) / 4 for y in (0, 1) for x in (0, 1)])
            for view in tokens
        ]
    )
    found = connector.global_tokens(maps)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    before = connector.global_mlp(resized_grid(maps["layer_5"], 2)) * connector.token_scale
    assert not torch.allclose(before, expected, atol=1e-2)
