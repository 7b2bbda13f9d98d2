"""The fields that a published BLIP3-o config.json may have (specs section A.10)."""

from __future__ import annotations

from clipflow.models.folders.fields import ANY, Schema

_TEXT = """
    attention_dropout head_dim hidden_act hidden_size initializer_range intermediate_size
    layer_types max_position_embeddings max_window_layers num_attention_heads num_hidden_layers
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    use_sliding_window vocab_size
"""
_TOP = """
    edits gen_hidden_size gen_pooling gen_projector_type gen_vision_tower image_token_id n_query
    n_und_query text_config video_token_id vision_config vision_end_token_id
    vision_start_token_id vision_token_id vision_tower_pretrained
"""
_VISION = """
    depth embed_dim fullatt_block_indexes hidden_act hidden_size in_channels in_chans
    initializer_range intermediate_size num_heads out_hidden_size patch_size rope_parameters
    spatial_merge_size spatial_patch_size temporal_patch_size tokens_per_second window_size
"""
_IDS = " image_token_id video_token_id vision_end_token_id vision_start_token_id vision_token_id"
SCHEMA = Schema(
    family="BLIP3-o",
    known={
        "": frozenset((ANY + _TOP + _TEXT).split()),
        "text_config": frozenset((ANY + _TEXT + _IDS).split()),
        "vision_config": frozenset((ANY + _VISION).split()),
    },
    note_prefixes=(
        "mm_", "tune_", "freeze_", "tokenizer_", "image_aspect", "image_grid", "use_mm",
        "pretrain_",
    ),
    note_suffixes=("_path", "_lr"),
)  # fmt: skip
