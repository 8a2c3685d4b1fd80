"""The connector: an encoder's maps of global and local views become visual tokens of the language model.

Input: maps by name, [images, patches, width] for global views and [views, patches, width] for local ones. Output: visual tokens in the scale of the
language model's input embeddings. Every trainable part is a child named after its block (`global_mlp`, `local_mlp`, `resampler`, `gate`,
`compression`, `newline`, `selector`), so a parameter's first name tells which phase trains it. Invariant: what the connector computes depends on its
spec, its weights and its inputs alone; noise is an argument.

Source: Dense Connector (arXiv 2405.13800) for fusion, SliME (arXiv 2406.08487) for adapters and compression.
"""

import math
from collections.abc import Mapping
from typing import Literal, assert_never

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from model.adapters import Gate, Newline, Projector, resized_grid
from model.compression import Resampler
from model.errors import MissingMapError
from model.fusion import fuse
from model.merging import merged_order
from model.selector import LearnableSelector
from model.specs import ConnectorSpec, EncoderSpec, FusionSpec, GatedMixtureSpec, LearnableSelectorSpec, MLPSpec
from model.views import ViewPlan

__all__ = ["Connector", "Experts", "Standardiser", "build_connector"]

Experts = Literal["mixture", "mlp", "resampler"]
"""Which of the global branch's experts count; see `PhaseSpec.experts`."""

MIN_DEVIATION = 1e-6
"""A channel that never varies is centred and left at 0."""


class Standardiser(nn.Module):
    """Centres and scales channels by numbers measured once; the identity until then.

    Differs: neither paper has it. It is affine and stands before linear layers only, so it folds into them exactly.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    @torch.no_grad()
    def measure(self, tokens: Float[Tensor, "batch tokens width"]) -> None:
        """Set the numbers so that these tokens come out with mean 0 and deviation 1 per channel.

        Args:
            tokens: of enough images to be typical.
        """
        flat = tokens.reshape(-1, tokens.shape[-1]).double()
        deviation = flat.std(dim=0, correction=0)
        self.mean.copy_(flat.mean(dim=0))
        self.scale.copy_(torch.where(deviation > MIN_DEVIATION, 1 / deviation.clamp(min=MIN_DEVIATION), torch.zeros_like(deviation)))

    def folded_into(self, weight: Float[Tensor, "out width"], bias: Float[Tensor, "out"]) -> tuple[Float[Tensor, "out width"], Float[Tensor, "out"]]:
        """A linear layer that does this work as well: W ((x - mean) * scale) + b = (W * scale) x + (b - (W * scale) mean).

        Args:
            weight: of the layer behind.
            bias: of the same.

        Returns:
            Weight and bias in double precision, on the CPU, without a graph.
        """
        scaled = weight.detach().double().cpu() * self.scale.double().cpu()
        return scaled, bias.detach().double().cpu() - scaled @ self.mean.double().cpu()

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Centre and scale."""
        return (tokens - self.mean) * self.scale


class Connector(nn.Module):
    """Global and local branch; make it with `build_connector`."""

    token_scale: Tensor

    def __init__(
        self, spec: ConnectorSpec, *, encoder_width: int, num_patches: int, hidden: int, embedding_rms: float, generator: torch.Generator
    ) -> None:
        """Build and initialise.

        Args:
            spec: what to build.
            encoder_width: channels of a map.
            num_patches: patches in a view.
            hidden: the language model's width.
            embedding_rms: root mean square of the language model's input embeddings.
            generator: where the initial numbers come from.
        """
        super().__init__()
        self.spec, self.num_patches, self.hidden, self._encoder_width = spec, num_patches, hidden, encoder_width
        global_width = encoder_width * spec.global_branch.fusion.num_wide
        self.global_input = Standardiser(global_width)
        self.global_mlp = Projector(global_width, hidden, generator, start=spec.start)
        self.resampler: Resampler | None = None
        self.gate: Gate | None = None
        match spec.global_branch.adapters:
            case MLPSpec():
                pass
            case GatedMixtureSpec(attention_init=attention_init, noise=noise):
                side = math.isqrt(self.num_global_patches)
                self.resampler = Resampler(
                    query_grid=(side, side),
                    num_patches=self.num_global_patches,
                    width=global_width,
                    attention_init=attention_init,
                    generator=generator,
                )
                self.gate = Gate(global_width, own_noise=noise == "own")
            case _:
                assert_never(spec.global_branch.adapters)
        self.local_input: Standardiser | None = None
        self.compression: Resampler | None = None
        self.local_mlp: Projector | None = None
        self.newline: Newline | None = None
        self.selector: LearnableSelector | None = None
        if (local := spec.local_branch) is not None:
            local_width = encoder_width * local.fusion.num_wide
            self.local_input = Standardiser(local_width)
            if local.compression is not None:
                self.compression = Resampler(
                    query_grid=local.compression.grid,
                    num_patches=local.fusion.map_tokens(num_patches),
                    width=local_width,
                    attention_init=local.compression.attention_init,
                    generator=generator,
                )
            if local.projector == "own":
                self.local_mlp = Projector(local_width, hidden, generator, start=spec.start)
            if local.newline:
                self.newline = Newline(hidden, generator, start=spec.start)
            if isinstance(local.selector, LearnableSelectorSpec):
                self.selector = LearnableSelector(hidden, local.selector.width, generator)
        # A scale outside of the weights, so that a learning rate means the same whatever the embeddings' scale; it folds into the last layer.
        # Differs: the papers' tokens start in whatever scale the initialisation gives, as with `start = "authors"`; a small language model never
        # recovers from that.
        self.register_buffer("token_scale", torch.tensor(embedding_rms if spec.start == "scaled" else 1.0))

    @property
    def num_global_patches(self) -> int:
        """Tokens of a global map, which the resampler reads and the gate weighs: patches, or squares of them."""
        return self.spec.global_branch.fusion.map_tokens(self.num_patches)

    @property
    def tokens_per_global_view(self) -> int:
        """Visual tokens of a global view."""
        return self.spec.global_tokens(self.num_patches)

    @property
    def tokens_per_local_view(self) -> int:
        """Visual tokens of a local view; 0 without a local branch."""
        return 0 if self.spec.local_branch is None else self.spec.local_branch.view_tokens(self.num_patches)

    def local_order(self, plan: ViewPlan) -> Int[NDArray[np.int64], "tokens"]:
        """The order of an image's local tokens; see `merged_order`.

        Args:
            plan: of the image.

        Returns:
            Places among the image's local tokens; none without a local branch.
        """
        if self.spec.local_branch is None:
            return np.zeros(0, dtype=np.int64)
        return merged_order(plan, self.spec.local_branch, self.num_patches)

    def newline_token(self) -> Float[Tensor, "1 hidden"]:
        """What ends a picture's lines, in the embeddings' scale; zeros without one."""
        return self.token_scale.new_zeros(1, self.hidden) if self.newline is None else self.newline() * self.token_scale

    def blank_maps(self, fusion: FusionSpec) -> dict[str, Float[Tensor, "1 patches width"]]:
        """Maps of one view that shows nothing.

        Args:
            fusion: of the branch that is to read them.

        Returns:
            Zeros by map name.
        """
        return {map_spec.name: self.token_scale.new_zeros(1, map_spec.num_tokens(self.num_patches), self._encoder_width) for map_spec in fusion.maps}

    def fuse_global(self, maps: Mapping[str, Float[Tensor, "images patches width"]]) -> Float[Tensor, "images tokens wide"]:
        """Fused, not yet standardised tokens of global views."""
        return fuse(maps, self.spec.global_branch.fusion)

    def fuse_local(self, maps: Mapping[str, Float[Tensor, "views patches width"]]) -> Float[Tensor, "views tokens wide"]:
        """Fused, not yet standardised tokens of local views.

        Args:
            maps: maps by name.

        Returns:
            Tokens: [views, tokens, wide]; of STI more than there are patches.

        Raises:
            MissingMapError: there is no local branch.
        """
        if self.spec.local_branch is None:
            raise MissingMapError("this connector has no local branch; give it global views only, or a recipe with [connector.local]")
        return fuse(maps, self.spec.local_branch.fusion)

    def measure_inputs(
        self,
        global_maps: Mapping[str, Float[Tensor, "images global_tokens width"]],
        local_maps: Mapping[str, Float[Tensor, "views local_tokens width"]] | None,
    ) -> None:
        """Set the standardisation from some images' features, where the spec asks for it.

        Each branch has numbers of its own, but for one case: where the same fusion of both branches goes straight into the same projector, with
        neither a mixture nor a compression before it, one set is measured on the tokens of both. So the projector is one function of the maps, as in
        LLaVA-NeXT, and folds into that model's.

        Args:
            global_maps: maps of their global views.
            local_maps: maps of their local views; needed with a local branch.

        Raises:
            MissingMapError: the local branch is there and its maps are not.
        """
        if not self.spec.standardise_inputs:
            return
        global_tokens = self.fuse_global(global_maps)
        if self.local_input is None:
            self.global_input.measure(global_tokens)
            return
        if local_maps is None:
            raise MissingMapError("the connector's local branch needs local maps to measure its inputs, found none")
        local_tokens = self.fuse_local(local_maps)
        if self.spec.projects_alike:
            global_tokens = local_tokens = torch.cat([global_tokens, local_tokens])
        self.global_input.measure(global_tokens)
        self.local_input.measure(local_tokens)

    def global_tokens(
        self,
        maps: Mapping[str, Float[Tensor, "images patches width"]],
        *,
        experts: Experts = "mixture",
        noise: Float[Tensor, "images tokens experts"] | None = None,
    ) -> Float[Tensor, "images tokens_out hidden"]:
        """Visual tokens of global views.

        Args:
            maps: maps by name.
            experts: which experts count; a connector without a mixture has the projector alone, whatever this says.
            noise: standard normal numbers for the gate in training, None else.

        Returns:
            g0 * MLP(x) + g1 * MLP(R(x)) with a mixture, MLP(x) without, resized if the spec says so, in the embeddings' scale.
        """
        tokens = self.global_input(self.fuse_global(maps))
        if self.resampler is None or self.gate is None or experts == "mlp":
            projected: Tensor = self.global_mlp(tokens).float()
        elif experts == "resampler":
            projected = self.global_mlp(self.resampler(tokens)).float()
        else:
            both = self.global_mlp(torch.stack([tokens, self.resampler(tokens)]))  # one matrix product for both experts
            weights = self.gate(tokens, noise)
            projected = weights[..., 0:1] * both[0] + weights[..., 1:2] * both[1]
        return self._finished(projected, self.spec.global_branch.output_grid)

    def _finished(self, projected: Float[Tensor, "batch tokens hidden"], output_grid: int | None) -> Float[Tensor, "batch tokens_out hidden"]:
        resized = projected if output_grid is None else resized_grid(projected, output_grid)
        return resized * self.token_scale

    def local_tokens(self, maps: Mapping[str, Float[Tensor, "views patches width"]]) -> Float[Tensor, "views tokens hidden"]:
        """Visual tokens of local views, each by itself.

        Args:
            maps: maps by name.

        Returns:
            MLP(compression(x)) per view, MLP(x) without compression, resized if the spec says so, in the embeddings' scale.

        Raises:
            MissingMapError: there is no local branch.
        """
        fused = self.fuse_local(maps)
        assert self.local_input is not None
        assert self.spec.local_branch is not None
        tokens = self.local_input(fused)
        if self.compression is not None:
            tokens = self.compression(tokens)
        projector = self.global_mlp if self.local_mlp is None else self.local_mlp
        return self._finished(projector(tokens).float(), self.spec.local_branch.output_grid)


def build_connector(spec: ConnectorSpec, encoder: EncoderSpec, *, hidden: int, embedding_rms: float, seed: int) -> Connector:
    """Build a connector with its initial weights.

    Args:
        spec: what to build.
        encoder: whose maps it reads.
        hidden: the language model's width.
        embedding_rms: root mean square of the language model's input embeddings.
        seed: of the initial weights; the same seed gives the same bytes.

    Returns:
        The connector, in fp32, its input standardisation still the identity.

    Raises:
        SpecError: the connector asks for layers, pools or grids that the encoder does not have.
    """
    spec.check_encoder(encoder)
    return Connector(
        spec,
        encoder_width=encoder.width,
        num_patches=encoder.num_patches,
        hidden=hidden,
        embedding_rms=embedding_rms,
        generator=torch.Generator().manual_seed(seed),
    )
