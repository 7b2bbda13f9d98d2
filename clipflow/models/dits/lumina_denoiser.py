"""The Lumina transformer prepared for a sampling plan (`clipflow.sampling.plan.Denoiser`).

Of a step only this is left: for each block, four GEMMs on image tokens and seven fused ops. The
time embeddings of all steps are computed when the plan is made. Once per condition come its
projection, its half of the embedding, keys and values of all blocks, and with them the modulations
of all steps.
"""

# Shape suffixes: R = rows, N = image tokens, L = condition tokens, D = channels, G = heads of keys,
# K = head width, M = hidden channels of the feed-forward, V = numbers in a patch of the latents.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipflow import ops
from clipflow.models.dits.buffers import Buffers
from clipflow.models.dits.condition_keys import RowKeys
from clipflow.models.dits.linears import Linear, LinearLike, bytes_of_layers, tokens_of
from clipflow.models.dits.lumina_modulation import RowModulations
from clipflow.nn.joint_norm_attention import NORM_EPS, JointNormAttention
from clipflow.nn.packing import packed
from clipflow.nn.plain_modules import check_plain
from clipflow.nn.swiglu_feed_forward import SwiGLUFeedForward
from clipflow.sampling.plan import PlanSpec

if TYPE_CHECKING:
    from clipflow.models.dits.lumina import LuminaBlock, LuminaTransformer


class BlockWeights:
    """The weights of one block; matrices that multiply the same tokens are packed."""

    def __init__(
        self, block: LuminaBlock, linear: Callable[[Tensor, Tensor | None], LinearLike]
    ) -> None:
        own, other, feed = block.attn1, block.attn2, block.feed_forward
        inward = [own.to_q.weight, own.to_k.weight, own.to_v.weight, other.to_q.weight]
        self.inward = linear(packed(inward), None)
        self.out = linear(other.to_out[0].weight, None)
        self.gated = linear(packed([feed.linear_1.weight, feed.linear_3.weight]), None)
        self.down = linear(feed.linear_2.weight, None)
        # Once per condition: always in full precision.
        self.key_value = Linear(packed([other.to_k.weight, other.to_v.weight]), None)
        self.modulation = Linear(block.norm1.linear.weight, block.norm1.linear.bias)
        self.gate = block.gate.detach().tanh()[:, None]
        self.own_norm = _norm_weights(own)
        self.other_norm = _norm_weights(other)
        norms = (block.norm1.norm, block.norm2, block.ffn_norm1, block.ffn_norm2)
        self.first, self.branch, self.second, self.feed_branch = (n.weight.detach() for n in norms)
        self.context = block.norm1_context.weight.detach()
        self.eps = block.norm1_context.eps

    def keys_and_values(self, tokens: Tensor, out: Tensor) -> None:
        """Keys (normalized) and values, `out` [T, 2 G K], of condition tokens [T, D]."""
        normed = F.rms_norm(tokens, tokens.shape[-1:], self.context, self.eps)
        keys = self.key_value(normed, out)[:, : out.shape[1] // 2]
        _, weight, _, bias = self.other_norm
        keys.copy_(F.layer_norm(keys, keys.shape[-1:], weight, bias, NORM_EPS))


def _norm_weights(part: JointNormAttention) -> tuple[Tensor, ...]:
    """As `qk_norm_rope` takes them: weights of queries and keys, then biases."""
    norms = (part.norm_q, part.norm_k)
    return (*(n.weight.detach() for n in norms), *(n.bias.detach() for n in norms))


@dataclass
class Stream:
    """One evaluation on its way through the blocks.

    Attributes:
        hidden: the residual stream, [R, N, D], written in place.
        normed: its modulated norm, for the block that is next or the output.
        modulation: of each block, (s1, g1, s2, g2), [R, D] each.
        scale: of the output's norm, [R, D].
        buffers: of R rows.
    """

    hidden: Tensor
    normed: Tensor
    modulation: list[tuple[Tensor, ...]]
    scale: Tensor
    buffers: Buffers


class LuminaDenoiser:
    """One spec's constants, buffers and chain of ops of a `LuminaTransformer`.

    Raises:
        SamplingError: a module of the transformer was replaced or has hooks.
    """

    linear: type[LinearLike] = Linear

    def __init__(self, dit: LuminaTransformer, spec: PlanSpec) -> None:
        for part in (dit.patch_embedder, dit.layers, dit.norm_out):
            check_plain(part, planned_classes())
        self.dit, self.spec, self.eps = dit, spec, dit.config.norm_eps
        self.grid = dit.token_grid(*spec.latent_shape[1:])
        self.blocks = [BlockWeights(block, self.linear) for block in dit.layers]
        self.patch, self.out = (
            Linear(layer.weight, layer.bias)
            for layer in (dit.patch_embedder["proj"], dit.norm_out["linear_2"])
        )
        self.rope = dit.rope_table(self.grid)
        self.buffers, self.keys, self.modulations = _allocated(dit, spec)
        self.depth, self.stream_shape = len(self.blocks), self.buffers.hidden.shape
        self._embed_times()

    def constants(self) -> dict[str, int]:
        extent = "all steps" if self.modulations.at_once else "one step"
        held = {
            f"modulations of {extent} under the conditions": self.modulations.nbytes,
            "rotary table": sum(t.nbytes for t in self.rope),
            "keys and values of the conditions": self.keys.nbytes,
            "activations": self.buffers.nbytes,
        }
        quantized = bytes_of_layers(self.blocks)
        return {**held, "8-bit weights": quantized} if quantized else held

    @torch.no_grad()
    def set_condition(self, null: Sequence[Tensor], cond: Sequence[Tensor]) -> None:
        projections = [block.keys_and_values for block in self.blocks]
        first = 0
        for keys, tensors in self.keys.groups_of(null, cond):

            def embed(tokens: Tensor, lengths: Tensor, first: int = first) -> Tensor:
                return self._embed_conditions(first, tokens, lengths)

            keys.set(tensors, embed, projections)
            first += keys.count

    @torch.no_grad()
    def velocity(self, rows: Tensor, index: int) -> Tensor:
        stream = self.begin(rows, index)
        self.advance(stream, 0, self.depth)
        return self.finish(stream)

    def begin(self, rows: Tensor, index: int) -> Stream:
        """Embed `rows` for evaluation `index`; see `clipflow.sampling.first_block`."""
        buffers = self.buffers.of_rows(len(rows))
        modulation, scale = self.modulations.of(index, len(rows))
        shares = [block.chunk(4, dim=-1) for block in modulation]
        hidden = self._embed(rows, buffers)
        normed = ops.adaln_norm(
            hidden, None, shares[0][0],
            weight=self.blocks[0].first, norm="rms", eps=self.eps, out=buffers.normed,
        )  # fmt: skip
        return Stream(hidden, normed, shares, scale, buffers)

    def advance(self, stream: Stream, begin: int, end: int) -> None:
        """Run blocks `begin` to `end` - 1."""
        hidden, normed, buffers = stream.hidden, stream.normed, stream.buffers
        for number in range(begin, end):
            block = self.blocks[number]
            scale, gate, second_scale, last_gate = stream.modulation[number]
            self._attention(number, normed, buffers)
            ops.sandwich_residual_norm(
                hidden, buffers.branch, gate, second_scale,
                weight=block.branch, next_weight=block.second, eps=self.eps, out=(hidden, normed),
            )  # fmt: skip
            self._feed_forward(block, normed, buffers)
            last = number + 1 == self.depth
            following = block if last else self.blocks[number + 1]
            ops.sandwich_residual_norm(
                hidden, buffers.branch, last_gate,
                scale if last else stream.modulation[number + 1][0],
                weight=block.feed_branch, next_weight=following.first, eps=self.eps,
                out=(hidden, normed),
            )  # fmt: skip
            if last:
                self._norm_out(stream)

    def skip(self, stream: Stream, rest: Tensor) -> None:
        """Add `rest`, [R, N, D], to the stream instead of the blocks that are left."""
        stream.hidden.add_(rest)
        self._norm_out(stream)

    def finish(self, stream: Stream) -> Tensor:
        """The velocity, after the last block or `skip`."""
        buffers, p = stream.buffers, self.dit.config.patch_size
        R, (h, w) = len(stream.hidden), self.grid
        values = self.out(tokens_of(stream.normed), buffers.wide(self._values()))
        places = values.view(R, h, w, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        buffers.velocity.view(R, -1, h, p, w, p).copy_(places)
        return buffers.velocity.view(R, -1, h * p, w * p)

    def _embed_times(self) -> None:
        embedder = self.dit.time_caption_embed.timestep_embedder
        # Asked one time at a time, as the model itself is: the same bits in every schedule.
        times = [torch.tensor([time], device=self.spec.device) for time in self.modulations.times]
        with torch.no_grad():
            embeddings = torch.cat([embedder(time) for time in times])
        scale = self.dit.norm_out["linear_1"]
        layers = [block.modulation for block in self.blocks]
        self.modulations.set_weights(embeddings, layers, Linear(scale.weight, scale.bias))

    def _embed_conditions(self, first: int, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Projected conditions `first` on, [U, L, D]; their modulations are kept."""
        caption = self.dit.caption_projection(tokens)
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        embeddings = self.dit.time_caption_embed.embed_caption(caption, real)
        self.modulations.set_conditions(first, embeddings)
        return caption

    def _values(self) -> int:
        return self.spec.latent_shape[0] * self.dit.config.patch_size**2

    def _embed(self, rows: Tensor, buffers: Buffers) -> Tensor:
        R, (h, w), p = len(rows), self.grid, self.dit.config.patch_size
        patches = buffers.wide(self._values())
        places = rows.view(R, -1, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        patches.view(places.shape).copy_(places)
        self.patch(patches, tokens_of(buffers.hidden))
        return buffers.hidden

    def _attention(self, number: int, normed: Tensor, buffers: Buffers) -> None:
        """Self-attention plus gated cross-attention, projected, to the branch buffer."""
        block, config = self.blocks[number], self.dit.config
        R, N, D = normed.shape
        K, G = config.head_dim, config.num_kv_heads * config.head_dim
        inward = block.inward(tokens_of(normed), buffers.wide(2 * D + 2 * G))
        parts = inward.view(R, N, -1).split([D, G, G, D], dim=-1)
        q, k, v, query = (part.unflatten(-1, (-1, K)) for part in parts)
        turned = buffers.middle(2 * D + G).flatten().split([R * N * D, R * N * G, R * N * D])
        q_out, k_out, query_out = (
            part.view(like.shape) for part, like in zip(turned, (q, k, query), strict=True)
        )
        options = {"norm": "layer", "across_heads": True, "interleaved": True, "eps": NORM_EPS}
        ops.qk_norm_rope(
            q, k, *block.own_norm, q_rope=self.rope, k_rope=self.rope, out=(q_out, k_out), **options
        )
        ops.qk_norm_rope(
            query, k[:, :0], *block.other_norm, q_rope=self.rope, out=(query_out, k_out[:, :0]),
            **options,
        )  # fmt: skip
        mixed = ops.dit_attention(q_out, k_out, v)
        for rows, other in self.keys.attend(number, query_out):
            mixed[rows].addcmul_(block.gate, other)
        block.out(mixed.view(R * N, D), tokens_of(buffers.branch))

    def _feed_forward(self, block: BlockWeights, normed: Tensor, buffers: Buffers) -> None:
        M = self.dit.config.intermediate_size
        both = block.gated(tokens_of(normed), buffers.wide(2 * M))
        gated = ops.swiglu(*both.chunk(2, dim=-1), out=buffers.middle(M))
        block.down(gated, tokens_of(buffers.branch))

    def _norm_out(self, stream: Stream) -> None:
        from clipflow.models.dits.lumina import OUT_NORM_EPS

        ops.adaln_norm(stream.hidden, None, stream.scale, eps=OUT_NORM_EPS, out=stream.normed)


def planned_classes() -> tuple[type[nn.Module], ...]:
    """The modules whose weights the plan uses without calling them."""
    from clipflow.models.dits.lumina import LuminaBlock, ModulatedNorm

    own = (LuminaBlock, ModulatedNorm, JointNormAttention, SwiGLUFeedForward)
    return (*own, nn.ModuleList, nn.ModuleDict, nn.Linear, nn.RMSNorm, nn.LayerNorm)


def plan_bytes(dit: LuminaTransformer, spec: PlanSpec) -> int:
    """What `LuminaDenoiser` will hold beside the weights, from shapes alone."""
    sketch = replace(spec, device=torch.device("meta"))
    parts = _allocated(dit, sketch)
    h, w = dit.token_grid(*spec.latent_shape[1:])
    total = sum(part.nbytes for part in parts) + h * w * dit.config.head_dim * 4  # rotary, float32
    if spec.step_cache is not None:
        stream = parts[0].hidden.numel()
        total += spec.step_cache.elements(spec, stream) * spec.dtype.itemsize
    return total


def _allocated(dit: LuminaTransformer, spec: PlanSpec) -> tuple[Buffers, RowKeys, RowModulations]:
    config = dit.config
    h, w = dit.token_grid(*spec.latent_shape[1:])
    D, M, G = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    values = config.in_channels * config.patch_size**2
    buffers = Buffers.empty(
        spec.rows, h * w, D,
        wide=max(2 * D + 2 * G, 2 * M, values), middle=max(2 * D + G, M), out_channels=values,
        dtype=spec.dtype, device=spec.device,
    )  # fmt: skip
    blocks = len(dit.layers)
    keys = RowKeys(spec, blocks=blocks, heads=config.num_kv_heads, channels=G)
    modulations = RowModulations(spec, blocks=blocks, embedding=config.embedding_width, channels=D)
    return buffers, keys, modulations
