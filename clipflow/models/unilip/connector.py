"""The bidirectional connector between the language model and the diffusion transformer."""

# Shape suffixes: B = batch, L = positions, H = width.

from torch import Tensor, nn
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)


class Connector(nn.Module):
    """Qwen2 layers without the causal mask, then RMSNorm (specs: UniLIP, dual condition).

    Args:
        config: the language model's configuration; the layers have its sizes.
        num_layers: how many.
    """

    def __init__(self, config: Qwen2Config, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config, i) for i in range(num_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2RotaryEmbedding(config)

    def forward(self, hidden: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        """Mix `hidden` [B, L, H] among the real positions of `mask` [B, L]; same shape out."""
        L = hidden.shape[1]
        allowed = mask.bool()[:, None, None, :].expand(-1, 1, L, L)
        rotation = self.rotary_emb(hidden, position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=allowed, position_embeddings=rotation)
        return self.norm(hidden)
