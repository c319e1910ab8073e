"""Keys of config.json that change nothing: those of software, and others while they say what the model is anyway."""

from typing import Any

from ...moe.config import ModelConfig, QKNorm
from .family import layer_types, norm_topk_prob

IRRELEVANT = frozenset(
    (
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "auto_map",  # the code that it names is never run
        "dtype",  # each tensor has its own
        "torch_dtype",
        "use_cache",
        "max_position_embeddings",
        "max_sequence_length",
        "model_max_length",
        "pretraining_tp",
        "gradient_checkpointing",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "attn_implementation",
        "use_flash_attention",
        "unsloth_fixed",
        "unsloth_version",
        "is_llama_config",
        # what a forward pass returns
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        # tokenizer and generation
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "prefix",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        # heads for other tasks
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "task_specific_params",
        "problem_type",
        "classifier_dropout",
    )
)
"""Keys that decide nothing about the function of a causal language model, whatever their values."""

WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "chunk_size_feed_forward": (0, None),
    "clip_qkv": (None,),
    "cross_attention_hidden_size": (None,),
    "embedding_multiplier": (1, None),
    "embd_pdrop": (0, None),
    "attn_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "attention_dropout": (0, None),
    "final_logit_softcapping": (None,),
    "hidden_dropout": (0, None),
    "hidden_dropout_prob": (0, None),
    "attention_probs_dropout_prob": (0, None),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False, None),
    "logits_scaling": (1, None),
    "pruned_heads": ({}, None),
    "residual_multiplier": (1, None),
    "rope_scaling": (None,),
    "tie_encoder_decoder": (False, None),
    "use_parallel_residual": (False, None),
    "use_rmsnorm": (True,),
}
"""Values with which a key that no family reads changes nothing."""


def harmless(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """Returns the values with which keys that the family does not read change nothing: those that say what the model is anyway."""
    attention, moe = config.attention, config.moe
    shared = moe.shared_hidden
    absent = () if shared else (None,)
    return WITHOUT_EFFECT | {
        "attention_bias": (attention.qkv_bias and attention.output_bias, *(() if attention.qkv_bias else (None,))),
        "layer_types": (layer_types(config), None),
        "mlp_bias": (moe.bias, *(() if moe.bias else (None,))),
        "n_shared_experts": (shared // moe.hidden, *absent),
        "num_shared_experts": (shared // moe.hidden, *absent),
        "norm_topk_prob": (norm_topk_prob(config) or moe.router.softmax_after_top_k,),
        "num_nextn_predict_layers": (config.mtp_depth,),
        "qkv_bias": (attention.qkv_bias, *(() if attention.qkv_bias else (None,))),
        "use_qkv_bias": (attention.qkv_bias,),
        "rope_interleaved": (attention.rope.interleaved,),
        "rope_interleave": (attention.rope.interleaved,),
        "routed_scaling_factor": (moe.router.scale,),
        "scoring_func": (moe.router.score.value,),
        "shared_expert_intermediate_size": (shared, *absent),
        "shared_intermediate_size": (shared, *absent),
        "sliding_window": (attention.window,),
        "use_bias": (False, None),
        "use_qk_norm": (attention.qk_norm is not QKNorm.none,),
        "use_sliding_window": (attention.window is not None,),
    }
