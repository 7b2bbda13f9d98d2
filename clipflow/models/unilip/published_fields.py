"""The fields that a published UniLIP config.json may have (specs section 6)."""

from __future__ import annotations

from clipflow.models.folders.fields import ANY, Schema

_TOP = """
    connect_layer dit_interpolation_scale downsample_ratio image_seq_length image_token_id n_query
    projector_hidden_act text_config unilip_factor vision_config vision_feature_layer
    vision_feature_select_strategy
"""
# InternVL's first releases left these in both towers' objects; none is in use.
_MIXTURE = """
    capacity_factor eval_capacity_factor laux_allreduce moe_coeff_ratio moe_config
    moe_intermediate_size moe_output_scale noisy_gate_policy num_experts num_routed_experts
    num_shared_experts shared_expert_intermediate_size use_flash_attn use_moe use_residual use_rts
    use_weighted_residual
"""
_TEXT = """
    attention_dropout attn_implementation head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_window_layers num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    sliding_window use_sliding_window vocab_size
"""
_VISION = """
    attention_bias attention_dropout drop_path_rate dropout hidden_act hidden_dropout_prob
    hidden_size image_size initializer_factor initializer_range intermediate_size layer_norm_eps
    layer_scale_init_value norm_type num_attention_heads num_channels num_hidden_layers patch_size
    projection_dropout qk_normalization qkv_bias use_absolute_position_embeddings use_mask_token
    use_mean_pooling use_qk_norm
"""
SCHEMA = Schema(
    family="UniLIP",
    known={
        "": frozenset((ANY + _TOP).split()),
        "text_config": frozenset((ANY + _MIXTURE + _TEXT).split()),
        "vision_config": frozenset((ANY + _MIXTURE + _VISION).split()),
    },
    note_prefixes=("mm_", "tune_", "freeze_", "tokenizer_", "image_", "use_mm"),
    note_suffixes=("_path", "_lr"),
)
