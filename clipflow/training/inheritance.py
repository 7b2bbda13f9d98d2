"""What a scenes BLIP3-o takes over from the finished UniLIP-scenes before it is trained.

Vision: InternViT's blocks become Qwen2.5-VL's. A LayerNorm is an RMSNorm of a residual stream whose
mean is zero, its bias goes into the layer after it, channel scales into the layer before; and

    GELU(x) ~ x sigmoid(1.702 x) = SiLU(1.702 x) / 1.702

is a gated layer whose "up" half is constant. Positions and the class token have no counterpart.

Language: Qwen2's layers are Qwen2.5-VL's. They follow new layers that change nothing at first and
learn what the vision tower cannot know, where in the picture a feature is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from clipflow.models.blip3o.config import BLIP3oConfig
from clipflow.models.blip3o.feature_decoder import FeatureDecoder, FeatureDecoderConfig
from clipflow.models.blip3o.model import BLIP3oModel
from clipflow.models.unilip import UniLIPModel

GELU_SLOPE = 1.702
# BLIP3-o's special tokens and those of UniLIP that mean the same.
MEANINGS = {
    "<|vision_start|>": "<img>",
    "<|vision_end|>": "</img>",
    "<|image_pad|>": "<IMG_CONTEXT>",
    "[IMG]": "<img>",
}


@torch.no_grad()
def inherit(
    model: BLIP3oModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: UniLIPModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Copy vision tower, language model and queries of `teacher` into `model`."""
    weights = {
        **vision_weights(teacher, model.config),
        **language_weights(model, teacher),
        "latent_queries": teacher.latent_queries[:, : model.config.n_query],
    }
    for name in ("language_model.embed_tokens.weight", "lm_head.weight"):
        table = teacher.get_parameter(name)
        weights[name] = token_rows(table, tokenizer, teacher_tokenizer)
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        parameters[name].copy_(value)


@torch.no_grad()
def inherit_decoder(teacher: UniLIPModel, config: BLIP3oConfig) -> FeatureDecoder:
    """The teacher's decoder behind a projection that picks its latents out of the features."""
    sizes = FeatureDecoderConfig(
        feature_width=config.dit.in_channels,
        grid_side=config.latent_side,
        spread=teacher.config.latent_side // config.latent_side,
        decoder=teacher.config.decoder,
    )
    decoder = FeatureDecoder(sizes)
    decoder.decoder.load_state_dict(teacher.vae_decoder.decoder.state_dict())
    decoder.proj.weight.copy_(torch.eye(*decoder.proj.weight.shape))
    decoder.proj.bias.zero_()
    return decoder.eval()


def token_rows(
    table: Tensor, tokenizer: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase
) -> Tensor:
    """The rows of `table` in the order of another tokenizer; new words get the mean of all."""
    known, mean = source.get_vocab(), table.mean(0)
    rows = []
    for word in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        index = known.get(MEANINGS.get(word, word))
        rows.append(mean if index is None else table[index])
    return torch.stack(rows)


def language_weights(model: BLIP3oModel, teacher: UniLIPModel) -> dict[str, Tensor]:
    """The teacher's layers at the end, before them layers that add nothing to what they read."""
    new = model.config.text.num_hidden_layers - teacher.config.text.num_hidden_layers
    weights = {"language_model.norm.weight": teacher.language_model.norm.weight}
    for name, value in teacher.language_model.layers.named_parameters():
        index, _, rest = name.partition(".")
        weights[f"language_model.layers.{int(index) + new}.{rest}"] = value
    for index in range(new):
        for last in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            name = f"language_model.layers.{index}.{last}"
            weights[name] = torch.zeros_like(model.get_parameter(name))
    return weights


def vision_weights(teacher: UniLIPModel, config: BLIP3oConfig) -> dict[str, Tensor]:
    """Qwen2.5-VL's vision transformer that computes what the teacher's does, but for positions."""
    tower, width = teacher.vision_tower, config.vision.hidden_size
    weights = _patch_weights(teacher, config)
    for index, layer in enumerate(tower.encoder["layers"]):
        own = f"visual.blocks.{index}."
        qkv, qkv_bias = _after_norm(layer.norm1, layer.attn.qkv)
        fc1, fc1_bias = _after_norm(layer.norm2, layer.mlp.fc1)
        proj, proj_bias = _into_stream(layer.attn.proj, layer.ls1)
        fc2, fc2_bias = _into_stream(layer.mlp.fc2, layer.ls2)
        if index == 0:  # the first bias behind the patches, which have none in Qwen2.5-VL
            proj_bias = proj_bias + _constant(teacher, config)
        weights |= {
            own + "norm1.weight": layer.norm1.weight,
            own + "norm2.weight": layer.norm2.weight,
            own + "attn.qkv.weight": qkv,
            own + "attn.qkv.bias": qkv_bias,
            own + "attn.proj.weight": proj,
            own + "attn.proj.bias": proj_bias,
            own + "mlp.gate_proj.weight": GELU_SLOPE * fc1,
            own + "mlp.gate_proj.bias": GELU_SLOPE * fc1_bias,
            own + "mlp.up_proj.weight": torch.zeros_like(fc1),
            own + "mlp.up_proj.bias": torch.full_like(fc1_bias, 1 / GELU_SLOPE),
            own + "mlp.down_proj.weight": fc2,
            own + "mlp.down_proj.bias": fc2_bias,
        }
    norm, first, _, second = teacher.multi_modal_projector
    inner, inner_bias = _after_norm(norm, first)
    spare = width - inner.shape[0]
    return weights | {
        "visual.merger.ln_q.weight": norm.weight,
        "visual.merger.mlp.0.weight": torch.cat([inner, torch.randn(spare, width) * width**-0.5]),
        "visual.merger.mlp.0.bias": torch.cat([inner_bias, torch.zeros(spare)]),
        "visual.merger.mlp.2.weight": torch.cat(
            [second.weight, torch.zeros(second.out_features, spare)], dim=1
        ),
        "visual.merger.mlp.2.bias": second.bias,
    }


def _patch_weights(teacher: UniLIPModel, config: BLIP3oConfig) -> dict[str, Tensor]:
    kernel = teacher.vision_tower.embeddings.patch_embedding.weight
    ratio = torch.tensor(config.image_std) / torch.tensor(teacher.config.image_std)
    kernel = _centered(kernel.flatten(1)).view_as(kernel) * ratio[:, None, None]
    frames = config.vision.temporal_patch_size
    frame = kernel[:, :, None].expand(-1, -1, frames, -1, -1) / frames
    return {"visual.patch_embed.proj.weight": frame}


def _constant(teacher: UniLIPModel, config: BLIP3oConfig) -> Tensor:
    """What every patch has: the teacher's bias, mean position, and the other normalization."""
    embeddings = teacher.vision_tower.embeddings
    mean, std = (torch.tensor(v) for v in (teacher.config.image_mean, teacher.config.image_std))
    moved = (torch.tensor(config.image_mean) - mean) / std
    color = embeddings.patch_embedding.weight.sum((2, 3)) @ moved
    place = embeddings.position_embedding[0, 1:].mean(0)
    return _centered((embeddings.patch_embedding.bias + color + place)[:, None])[:, 0]


def _after_norm(norm: torch.nn.LayerNorm, linear: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of `linear` where the norm before it has no bias."""
    return linear.weight, linear.bias + linear.weight @ norm.bias


def _into_stream(linear: torch.nn.Linear, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias whose outputs, scaled per channel, have a mean of zero."""
    weight, bias = scale[:, None] * linear.weight, scale * linear.bias
    return _centered(weight), _centered(bias[:, None])[:, 0]


def _centered(weight: Tensor) -> Tensor:
    return weight - weight.mean(0, keepdim=True)
