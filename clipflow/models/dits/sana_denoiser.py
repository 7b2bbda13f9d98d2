"""The SANA transformer prepared for a sampling plan (`clipflow.sampling.plan.Denoiser`).

Of a step only this is left: for each block, four GEMMs on image tokens for attention, two for the
feed-forward branch, and six fused ops. Everything that depends on the time alone (embeddings,
modulations) is computed for all steps at once; everything that depends on the condition alone
(projection, norm, keys and values of all blocks) once per condition.
"""

# Shape suffixes: B = samples, R = rows, N = h*w image tokens, L = condition tokens, D = channels,
# M = hidden channels of one half, E = evaluations, U = different conditions.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipflow import ops
from clipflow.models.dits.buffers import Buffers
from clipflow.models.dits.condition_keys import RowKeys
from clipflow.models.dits.linears import Linear, LinearLike, Operand, tokens_of
from clipflow.models.dits.sana_weights import BlockWeights, Norms, norm_heads
from clipflow.nn.cross_attention import CrossAttention
from clipflow.nn.glu_mbconv import GLUMBConv
from clipflow.nn.linear_attention import ReLULinearAttention
from clipflow.nn.plain_modules import check_plain
from clipflow.sampling.plan import PlanSpec

if TYPE_CHECKING:
    from clipflow.models.dits.sana import SanaTransformer


@dataclass
class Stream:
    """One evaluation on its way through the blocks.

    Attributes:
        hidden: the residual stream, [R, N, D], written in place.
        normed: its modulated norm, for the block that is next or the output.
        modulation: shifts, scales and gates without the blocks' tables, six of [R, D].
        after: (shift, scale, table) of the norm before each block, and of the output's.
        gates: of all blocks, [blocks, 2, D].
        buffers: of R rows.
    """

    hidden: Tensor
    normed: Operand
    modulation: list[Tensor]
    after: list[tuple[Tensor, Tensor, Tensor]]
    gates: Tensor
    buffers: Buffers


class SanaDenoiser:
    """One spec's constants, buffers and chain of ops of a `SanaTransformer`.

    Raises:
        SamplingError: a module of the transformer was replaced or has hooks.
    """

    linear: type[LinearLike] = Linear

    def __init__(self, dit: SanaTransformer, spec: PlanSpec) -> None:
        for part in (dit.patch_embed, dit.transformer_blocks, dit.proj_out):
            check_plain(part, planned_classes())
        self.dit, self.spec, self.eps = dit, spec, dit.config.norm_eps
        self.blocks = [BlockWeights(block, self.linear) for block in dit.transformer_blocks]
        self.out_table = dit.scale_shift_table.detach()
        self._make_constants()
        self.buffers = _buffers(dit, spec)
        self.depth, self.stream_shape = len(self.blocks), self.buffers.hidden.shape
        self.keys = _condition_keys(dit, spec)

    def constants(self) -> dict[str, int]:
        return {
            "modulations of all steps": sum(
                t.nbytes for t in (self.modulation, self.embedding, self.gates)
            ),
            "position table": self.place.nbytes,
            "keys and values of the conditions": self.keys.nbytes,
            "activations": self.buffers.nbytes,
        }

    @torch.no_grad()
    def set_condition(self, null: Sequence[Tensor], cond: Sequence[Tensor]) -> None:
        weights = [block.key_value for block in self.blocks]
        for keys, tensors in self.keys.groups_of(null, cond):
            keys.set(tensors, lambda tokens, _: self.dit.embed_condition(tokens), weights)

    @torch.no_grad()
    def velocity(self, rows: Tensor, index: int) -> Tensor:
        stream = self.begin(rows, index)
        self.advance(stream, 0, self.depth)
        return self.finish(stream)

    def begin(self, rows: Tensor, index: int) -> Stream:
        """Embed `rows` for evaluation `index`; see `clipflow.sampling.first_block`."""
        R = len(rows)
        modulation = [m.expand(R, -1) for m in self.modulation[index].unsqueeze(1)]
        embedding = self.embedding[index].expand(R, -1)
        # What modulates the norm after each block: the next block's, at last the output's.
        after = [(*modulation[:2], block.tables[:2]) for block in self.blocks]
        after.append((embedding, embedding, self.out_table))
        buffers = self.buffers.of_rows(R)
        hidden = self._embed(rows, buffers)
        normed = self._first_norm(hidden, *after[0], buffers)
        return Stream(hidden, normed, modulation, after, self.gates[index], buffers)

    def advance(self, stream: Stream, begin: int, end: int) -> None:
        """Run blocks `begin` to `end` - 1."""
        hidden, modulation, buffers = stream.hidden, stream.modulation, stream.buffers
        for number in range(begin, end):
            block, gates = self.blocks[number], stream.gates[number]
            self._self_attention(block, hidden, stream.normed, gates[0], buffers)
            self._cross_attention(number, hidden, buffers)
            normed = self._norm_after(
                hidden, None, *modulation[3:5], block.tables[3:5], buffers, last=False
            )
            self._feed_forward(block, normed, buffers)
            stream.normed = self._norm_after(
                hidden, gates[1].expand(len(hidden), -1), *stream.after[number + 1], buffers,
                last=number + 1 == self.depth,
            )  # fmt: skip

    def skip(self, stream: Stream, rest: Tensor) -> None:
        """Add `rest`, [R, N, D], to the stream instead of the blocks that are left."""
        buffers = replace(stream.buffers, branch=rest)
        stream.normed = self._norm_after(stream.hidden, None, *stream.after[-1], buffers, last=True)

    def finish(self, stream: Stream) -> Tensor:
        """The velocity, after the last block or `skip`."""
        return self._project_out(stream.normed)

    def _make_constants(self) -> None:
        dit, spec = self.dit, self.spec
        times = [spec.timesteps[entry.level] for entry in spec.table]
        # Asked one time at a time, as the model itself is: the same bits in every schedule.
        known = {
            time: dit.time_embed(torch.tensor([time], device=spec.device))
            for time in dict.fromkeys(times)
        }
        self.modulation = torch.cat([known[time][0] for time in times])  # [E, 6, D]
        self.embedding = torch.cat([known[time][1] for time in times])  # [E, D]
        tables = torch.stack([block.tables[[2, 5]] for block in self.blocks])
        self.gates = self.modulation[:, None, [2, 5]] + tables  # [E, blocks, 2, D]
        projection = dit.patch_embed["proj"]
        self.patch_weight = projection.weight.detach().flatten(1).t()  # [C, D]
        place = projection.bias.detach().expand(spec.tokens, -1)
        if dit.config.position_table:
            place = place + dit.position_table(*spec.latent_shape[1:]).to(place)
        self.place = place.contiguous()  # [N, D]

    def _embed(self, rows: Tensor, buffers: Buffers) -> Tensor:
        R = len(rows)
        return torch.baddbmm(
            self.place.expand(R, -1, -1),
            rows.flatten(2).transpose(1, 2),
            self.patch_weight.expand(R, -1, -1),
            out=buffers.hidden,
        )

    def _first_norm(
        self, hidden: Tensor, shift: Tensor, scale: Tensor, table: Tensor, buffers: Buffers
    ) -> Tensor:
        return ops.adaln_norm(hidden, shift, scale, table=table, eps=self.eps, out=buffers.normed)

    def _norm_after(
        self,
        hidden: Tensor,
        gate: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        table: Tensor,
        buffers: Buffers,
        *,
        last: bool,
    ) -> Tensor:
        """Add the branch in the buffers to `hidden` in place; return the modulated norm of that."""
        out = (hidden, buffers.normed)
        ops.gated_residual_norm(
            hidden, buffers.branch, gate, shift, scale, table=table, eps=self.eps, out=out
        )
        return buffers.normed

    def _self_attention(
        self, block: BlockWeights, hidden: Tensor, normed: Operand, gate: Tensor, buffers: Buffers
    ) -> None:
        R, N, D = hidden.shape
        heads = self.dit.config.num_attention_heads
        qkv = block.qkv(tokens_of(normed), buffers.wide(3 * D)).view(R, N, 3, heads, D // heads)
        q, k, v = qkv.unbind(2)
        if block.own_norms is not None:
            out = (part.view(q.shape) for part in buffers.behind(3 * D, D, D))
            q, k = norm_heads(q, k, block.own_norms, tuple(out))
        mixed = buffers.middle(D)
        ops.linear_attention(q, k, v, out=mixed.view(R, N, heads, D // heads))
        branch = block.own_out(mixed, tokens_of(buffers.branch))
        hidden.addcmul_(gate, branch.view(R, N, D))

    def _cross_attention(self, number: int, hidden: Tensor, buffers: Buffers) -> None:
        block = self.blocks[number]
        R, N, D = hidden.shape
        heads = self.dit.config.num_cross_attention_heads
        query = block.query(tokens_of(hidden), buffers.wide(D)).view(R, N, heads, D // heads)
        if block.cross_norms is not None:
            query = self._normed_query(query, block.cross_norms, buffers)
        for rows, mixed in self.keys.attend(number, query):
            block.cross_out(mixed.view(-1, D), tokens_of(buffers.branch[rows]))

    def _normed_query(self, query: Tensor, norms: Norms, buffers: Buffers) -> Tensor:
        D = query.shape[2] * query.shape[3]
        (out,) = buffers.behind(D, D)
        no_keys = query[:, :0]
        normed, _ = norm_heads(
            query, no_keys, norms, (out.view(query.shape), torch.empty_like(no_keys))
        )
        return normed

    def _feed_forward(self, block: BlockWeights, normed: Operand, buffers: Buffers) -> None:
        R, N, _ = buffers.branch.shape
        M = len(block.depth[1]) // 2
        wide = block.inverted(tokens_of(normed), buffers.wide(2 * M)).view(R, N, 2 * M)
        gated = buffers.middle(M)
        ops.glu_conv(
            wide, *block.depth, self.spec.latent_shape[1:], pre_silu=True, out=gated.view(R, N, M)
        )
        block.point(gated, tokens_of(buffers.branch))

    def _project_out(self, normed: Tensor) -> Tensor:
        R, (h, w) = len(normed), self.spec.latent_shape[1:]
        weight, bias = self.dit.proj_out.weight.detach(), self.dit.proj_out.bias.detach()
        out = self.buffers.velocity[:R]
        torch.baddbmm(
            bias[:, None].expand(R, -1, h * w),
            weight.expand(R, -1, -1),
            normed.transpose(1, 2),
            out=out,
        )
        return out.view(R, -1, h, w)


def planned_classes() -> tuple[type[nn.Module], ...]:
    """The modules whose weights the plan uses without calling them."""
    from clipflow.models.dits.sana import SanaBlock

    own = (SanaBlock, ReLULinearAttention, CrossAttention, GLUMBConv)
    return (*own, nn.ModuleList, nn.ModuleDict, nn.Linear, nn.Conv2d, nn.RMSNorm)


def plan_bytes(dit: SanaTransformer, spec: PlanSpec) -> int:
    """What `SanaDenoiser` will hold beside the weights, from shapes alone."""
    blocks, D = dit.transformer_blocks, dit.config.hidden_size
    sketch = replace(spec, device=torch.device("meta"))
    buffers = _buffers(dit, sketch)
    keys = _condition_keys(dit, sketch)
    numbers = len(spec.table) * (7 + 2 * len(blocks)) * D + spec.tokens * D
    if spec.step_cache is not None:
        numbers += spec.step_cache.elements(spec, spec.rows * spec.tokens * D)
    return buffers.nbytes + keys.nbytes + numbers * spec.dtype.itemsize


def _buffers(dit: SanaTransformer, spec: PlanSpec) -> Buffers:
    D, M = dit.config.hidden_size, len(dit.transformer_blocks[0].ff.conv_depth.bias) // 2
    return Buffers.empty(
        spec.rows,
        spec.tokens,
        D,
        wide=max((3 if dit.config.qk_norm == "none" else 5) * D, 2 * M),
        middle=max(D, M),
        out_channels=dit.config.out_channels,
        dtype=spec.dtype,
        device=spec.device,
    )


def _condition_keys(dit: SanaTransformer, spec: PlanSpec) -> RowKeys:
    return RowKeys(
        spec,
        blocks=len(dit.transformer_blocks),
        heads=dit.config.num_cross_attention_heads,
        channels=dit.config.hidden_size,
    )
