"""What settings are called elsewhere: in transformers and its Trainer, Megatron-LM, torchtitan, nanoGPT and Lightning."""

_NAMES = {
    "steps": "max_steps num_steps total_steps train_steps training_steps train_iters max_iters iterations",
    "seed": "random_seed manual_seed",
    "sequence_length": "seq_len seq_length max_seq_len max_seq_length max_length block_size context_length n_ctx ctx_len "
    "max_position_embeddings",
    "precision": "mixed_precision dtype torch_dtype amp param_dtype",
    "compile": "torch_compile",
    "batch.sequences": "batch_size global_batch_size train_batch_size gbs total_batch_size",
    "batch.micro": "micro_batch_size local_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu mbs "
    "device_batch_size",
    "run.dir": "output_dir out_dir save_dir log_dir dump_folder default_root_dir save",
    "run.name": "run_name exp_name experiment_name wandb_run_name",
    "model.layers": "num_layers num_hidden_layers n_layers n_layer depth",
    "model.width": "hidden_size d_model dim n_embd embed_dim embedding_size",
    "model.heads": "num_heads num_attention_heads n_heads n_head",
    "model.kv_heads": "num_key_value_heads num_query_groups n_kv_heads num_kv_heads",
    "model.head_width": "head_dim kv_channels head_size",
    "model.hidden": "intermediate_size ffn_hidden_size ffn_dim d_ff mlp_dim",
    "model.activation": "hidden_act activation_function",
    "model.vocabulary": "vocab_size padded_vocab_size",
    "model.dense_first": "first_k_dense_replace n_dense_layers",
    "model.moe_every": "moe_layer_freq decoder_sparse_step",
    "model.tie_embeddings": "tie_word_embeddings",
    "model.norm_epsilon": "rms_norm_eps layernorm_epsilon norm_eps layer_norm_eps",
    "model.dropout": "hidden_dropout resid_pdrop",
    "model.init_std": "initializer_range init_method_std",
    "model.mtp_depth": "mtp_num_layers num_nextn_predict_layers",
    "model.attention.window": "sliding_window window_size",
    "model.attention.rope.theta": "rope_theta rotary_base",
    "model.moe.experts": "num_experts n_experts num_local_experts n_routed_experts num_moe_experts moe_num_experts",
    "model.moe.top_k": "topk top_k num_experts_per_tok moe_router_topk experts_per_token moe_top_k",
    "model.moe.hidden": "moe_intermediate_size moe_ffn_hidden_size expert_hidden_size",
    "model.moe.shared_hidden": "shared_expert_intermediate_size moe_shared_expert_intermediate_size",
    "model.moe.balance.coefficient": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef aux_loss_coeff load_balance_coeff "
    "load_balancing_loss_weight",
    "model.moe.balance.bias_rate": "moe_router_bias_update_rate bias_update_speed",
    "model.moe.z_coefficient": "moe_z_loss_coeff router_z_loss_coef z_loss z_loss_coef",
    "model.moe.capacity.factor": "capacity_factor moe_expert_capacity_factor expert_capacity",
    "parallel.tensor": "tp tp_size tensor_parallel_size tensor_parallel_degree tensor_model_parallel_size",
    "parallel.pipeline": "pp pp_size pipeline_parallel_size pipeline_parallel_degree pipeline_model_parallel_size",
    "parallel.expert": "ep ep_size expert_parallel_size expert_parallel_degree expert_model_parallel_size",
    "parallel.expert_tensor": "etp expert_tensor_parallel_size expert_tensor_parallel_degree",
    "parallel.context": "cp cp_size context_parallel_size context_parallel_degree sequence_parallel_size",
    "parallel.shard": "fsdp dp_shard fsdp_size data_parallel_shard_degree",
    "parallel.zero": "zero_stage zero_optimization sharding_strategy",
    "parallel.recompute": "gradient_checkpointing activation_checkpointing activation_checkpoint recompute_granularity recompute",
    "data.name": "dataset dataset_name",
    "data.path": "data_path dataset_path train_file train_data data_dir train_data_path",
    "data.subset": "dataset_config_name dataset_config",
    "data.column": "text_column dataset_text_field text_field text_key json_keys",
    "data.workers": "num_workers dataloader_num_workers preprocessing_num_workers",
    "tokenizer.path": "tokenizer_name tokenizer_model tokenizer_path tokenizer_name_or_path",
    "tokenizer.kind": "tokenizer_type",
    "optimizer.lr": "lr learning_rate max_lr peak_lr base_lr",
    "optimizer.beta1": "adam_beta1 betas",
    "optimizer.beta2": "adam_beta2",
    "optimizer.epsilon": "adam_epsilon adam_eps eps",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_norm": "max_grad_norm clip_grad grad_clip gradient_clip_val gradient_clipping max_norm",
    "schedule.shape": "lr_scheduler_type lr_decay_style scheduler lr_scheduler schedule_type",
    "schedule.warmup": "warmup_steps lr_warmup_iters num_warmup_steps warmup_iters",
    "schedule.decay": "lr_decay_iters decay_steps",
    "evaluate.every": "eval_steps eval_interval eval_every validation_freq",
    "checkpoint.every": "save_steps save_interval checkpoint_interval save_every",
    "checkpoint.keep": "save_total_limit keep_latest_k keep_last",
    "checkpoint.resume": "resume_from_checkpoint resume load load_checkpoint resume_from",
    "checkpoint.init": "init_from pretrained pretrained_checkpoint model_name_or_path finetune",
    "log.every": "logging_steps log_interval log_freq log_every",
    "tracker.project": "wandb_project project",
    "launch.nodes": "nnodes num_nodes num_machines",
    "launch.rendezvous": "master_addr rdzv_endpoint main_process_ip",
    # The value means something else here, so that the default is shown.
    "steps=": "epochs num_epochs max_epochs num_train_epochs",
    "batch.micro=": "grad_accum gradient_accumulation gradient_accumulation_steps accumulate_grad_batches accum_steps "
    "grad_accumulation_steps num_microbatches",
    "evaluate.sequences=": "eval_iters eval_batches limit_val_batches",
    "schedule.warmup=": "warmup_ratio warmup_fraction",
    "schedule.final=": "min_lr lr_min",
    # Whole overrides.
    "precision=bf16": "bf16 fp16 use_bf16",
    "tracker=wandb": "wandb report_to use_wandb wandb_log loggers",
    "engine=deepspeed": "deepspeed deepspeed_config",
    "launch=torchrun launch.ranks={value}": "gpus num_gpus n_gpus ngpu num_gpu nproc_per_node world_size num_processes devices dp "
    "data_parallel_size",
}
USUAL = {name: ours for ours, names in _NAMES.items() for name in names.split()}
"""From the names of others to a key here, to `key=` if the value means something else here, or to whole overrides."""


def usual_name(key: str) -> str | None:
    """Returns what the last part of `key` is called here, as USUAL has it."""
    return USUAL.get(key.rpartition(".")[2].lstrip("-").replace("-", "_").lower())
