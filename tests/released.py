"""Checkpoints as LLaVA, Dense Connector and SliME save them, and what their connectors compute, written from the papers' facts and not from our code.

The reference modules are plain torch (`nn.MultiheadAttention`, loops over positions) and carry the authors' parameter names, so their state dicts are
checkpoints in the authors' layout.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HIDDEN = 48


def sine_cosine_table(grid: int, width: int) -> Tensor:
    """Position codes of a grid in plain loops: half the channels for x, half for y, sines before cosines."""
    quarter = width // 4
    rows = []
    for y in range(grid):
        for x in range(grid):
            row = []
            for place in (x, y):
                angles = [place / 10000 ** (number / quarter) for number in range(quarter)]
                row += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(row)
    return torch.tensor(rows)


class ReferenceResampler(nn.Module):
    """SliME's resampler: one attention, a norm shared by keys and values, position codes on queries and keys, no residual."""

    def __init__(self, queries: int, width: int, heads: int, *, table: torch.dtype) -> None:
        super().__init__()
        self.grid = math.isqrt(queries)
        self.pos_embed = nn.Parameter(sine_cosine_table(self.grid, width).to(table), requires_grad=False)
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q = nn.LayerNorm(width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(width, eps=1e-6)
        self.ln_post = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, patches, width = tokens.shape
        key_grid = math.isqrt(patches)
        codes = self.pos_embed.to(tokens.dtype)
        raster = codes.reshape(1, self.grid, self.grid, width).permute(0, 3, 1, 2)
        resized = nn.functional.interpolate(raster, size=(key_grid, key_grid), mode="bicubic", align_corners=False)
        key_codes = resized.permute(0, 2, 3, 1).reshape(patches, width).to(self.pos_embed.dtype).to(tokens.dtype)
        normed = self.ln_kv(tokens).transpose(0, 1)
        queries = self.ln_q(self.query).unsqueeze(1).repeat(1, batch, 1)
        attended, _ = self.attn(queries + codes.unsqueeze(1), normed + key_codes.unsqueeze(1), normed)
        return self.ln_post(attended.transpose(0, 1))


class ReferenceProjector(nn.Sequential):
    """mlp2x_gelu: parameters 0.* and 2.*."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))


class ReferenceGated(nn.Module):
    """SliME's gated projector, as it is evaluated."""

    def __init__(self, patches: int, width: int, hidden: int, heads: int, *, table: torch.dtype) -> None:
        super().__init__()
        self.attn = ReferenceResampler(patches, width, heads, table=table)
        self.projection = ReferenceProjector(width, hidden)
        self.w_gate = nn.Parameter(torch.zeros(width, 2))
        self.w_noise = nn.Parameter(torch.zeros(width, 2))
        self.register_buffer("mean", torch.tensor([0.0]))
        self.register_buffer("std", torch.tensor([1.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        weights = torch.softmax(tokens @ self.w_gate, dim=-1)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-6)
        experts = torch.stack([self.projection(tokens), self.projection(self.attn(tokens))], dim=-1)
        return (experts * weights.unsqueeze(-2)).sum(dim=-1)


class ReferenceSampler(nn.Module):
    """What SliME calls the sampler: its compression; its cosine selector has no parameters."""

    def __init__(self, queries: int, width: int, heads: int, *, table: torch.dtype) -> None:
        super().__init__()
        self.post_qformer = ReferenceResampler(queries, width, heads, table=table)


def shake(module: nn.Module, seed: int) -> None:
    """Every parameter away from its start, as training leaves it: norms from 1, biases and the gate from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def slime_modules(
    *, patches: int, queries: int, width: int, hidden: int = HIDDEN, heads: int = 1, seed: int = 0, table: torch.dtype = torch.float32
) -> tuple[ReferenceGated, ReferenceSampler]:
    torch.manual_seed(seed)
    modules = ReferenceGated(patches, width, hidden, heads, table=table), ReferenceSampler(queries, width, heads, table=table)
    for number, module in enumerate(modules):
        shake(module, seed + number)
    return modules


def parameters_as(module: nn.Module, prefix: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's parameters as their training code names them; position tables keep their type."""
    named = {f"{prefix}.{name}": parameter.detach().clone() for name, parameter in module.named_parameters()}
    return {name: tensor if dtype is None or name.endswith("pos_embed") else tensor.to(dtype) for name, tensor in named.items()}


def write_slime(folder: Path, modules: tuple[ReferenceGated, ReferenceSampler], dtype: torch.dtype | None = None, **config: Any) -> Path:
    """A folder as SliME's training leaves it after a stage that trains adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parameters_as(modules[0], "model.mm_projector", dtype), folder / "mm_projector.bin")
    torch.save(parameters_as(modules[1], "model.sampler", dtype), folder / "sampler.bin")
    values = {
        "model_type": "llava_llama",
        "mm_projector_type": "gated",
        "mm_resampler_type": "cosine",
        "mm_vision_select_layer": -2,
        "mm_learnable_gated": -1,
        "seperator": 11,
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


def write_dense(folder: Path, projector: ReferenceProjector, kind: str = "dci", dtype: torch.dtype | None = None) -> Path:
    """A folder as Dense Connector's training leaves it after stage 1."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(parameters_as(projector, "model.mm_projector", dtype), folder / "mm_projector.bin")
    config = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_dense_connector_type": kind, "mm_vision_select_layer": -2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
