"""What are other trainers' flags here? Those of diffusers' examples, SimpleTuner, ai-toolkit and kohya's scripts.

A table, so that a command or a config that was pasted is answered in one go: each row is an answer and the names that
it is for, those of nested configs included. A flag that train_glance_lora.py has itself has no row.
"""

# Ours, and what others call it.
RENAMED = {
    "pretrained_model_name_or_path": "name_or_path model_name_or_path base_model dit "
    "pretrained_transformer_model_name_or_path",
    "instance_data_dir": "train_data_dir folder_path instance_data_root dataset_config jsonl_for_train",
    "instance_prompt": "default_caption",
    "output_dir": "training_folder output_name save_root hf_output",
    "rank": "network_dim linear lora_dim lora_r dim",
    "lora_alpha": "network_alpha linear_alpha",
    "lora_dropout": "network_dropout",
    "lora_layers": "lora_target_modules target_modules flux_lora_target lora_blocks only_if_contains "
    "ignore_if_contains only_target_transformer_blocks lora_unet_blocks train_norm_layers network_args network_kwargs",
    "max_train_steps": "steps num_training_steps max_steps num_train_epochs max_train_epochs epochs max_train_samples",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr unet_lr transformer_lr",
    "lr_warmup_steps": "lr_scheduler_warmup_steps",
    "lr_num_cycles": "lr_scheduler_num_cycles",
    "lr_power": "lr_scheduler_power",
    "optimizer": "optimizer_type use_adafactor use_lion_optimizer",
    "adam_beta1, --adam_beta2 and --adam_epsilon": "optimizer_args optimizer_params optimizer_config optimizer_beta1 "
    "optimizer_beta2 optimizer_epsilon",
    "adam_weight_decay": "weight_decay optimizer_weight_decay",
    "mixed_precision": "dtype full_bf16 full_fp16 dit_dtype save_weight_dtype base_model_default_dtype",
    "quantization nf4, int8 or fp8": "base_model_precision bnb_quantization_config_path do_fp8_training fp8_base "
    "fp8_base_unet fp8_scaled quantize quantize_via quantize_kwargs qtype load_in_4bit load_in_8bit use_qlora",
    "enable_group_offload": "blocks_to_swap low_vram layer_offloading lowram ramtorch "
    "gradient_checkpointing_cpu_offload cpu_offload_checkpointing group_offload_type "
    "group_offload_use_stream group_offload_blocks_per_group "
    "group_offload_to_disk_path block_swap_h2d_only split_mode offload_inactive_dit",
    "compile": "torch_compile dynamo_backend dynamo_mode dynamo_fullgraph dynamo_dynamic compile_backend compile_mode "
    "compile_dynamic compile_fullgraph compile_cache_size_limit dynamo_use_regional_compilation",
    "allow_tf32": "cuda_allow_tf32",
    "aspect keep": "aspect_ratio_buckets "
    "use_aspect_ratio_buckets enable_bucket min_bucket_reso max_bucket_reso "
    "bucket_reso_steps bucket_no_upscale aspect_bucket_rounding disable_bucket_pruning resolution_type crop_aspect",
    "flow_custom_timesteps, --flow_timesteps_mode or --grid": "weighting_scheme logit_mean logit_std mode_scale "
    "timestep_sampling timestep_type timestep_bias_strategy timestep_bias_begin timestep_bias_end "
    "timestep_bias_multiplier timestep_bias_portion discrete_flow_shift flow_shift training_shift sigmoid_scale "
    "linear_timesteps min_timestep max_timestep flow_schedule_shift flow_schedule_auto_shift flux_schedule_shift "
    "flux_schedule_auto_shift flux_fast_schedule flow_sigmoid_scale flow_use_uniform_schedule "
    "flow_use_beta_schedule timestep_boundary preserve_distribution_shape num_timestep_buckets",
    "pipeline_kwargs": "text_encoder_out_layers complex_human_instruction system_prompt tokenizer_max_length "
    "max_token_length t5xxl_max_token_length clip_skip upsample_prompt model_kwargs validation_guidance_rescale",
    "max_sequence_length": "max_text_length",
    "negative_prompt": "neg validation_negative_prompt",
    "true_cfg_scale": "validation_guidance_real",
    "guidance_scale": "validation_guidance validation_guidance_scale",
    "validation_prompt": "final_validation_prompt validation_prompts validation_prompt_library user_prompt_library "
    "sample_prompts prompts prompt samples",
    "num_validation_images": "num_eval_images",
    "validation_steps": "validation_epochs sample_every sample_every_n_steps sample_every_n_epochs "
    "validate_every_n_steps",
    "checkpointing_steps": "save_every save_every_n_steps save_every_n_epochs save_steps checkpoint_step_interval "
    "checkpointing_epochs save_n_epoch_ratio save_state checkpoint_epoch_interval",
    "checkpoints_total_limit": "max_step_saves_to_keep save_last_n_steps save_last_n_epochs save_last_n_steps_state "
    "save_last_n_epochs_state",
    "resume_from_checkpoint": "resume resume_from_huggingface initial_step initial_epoch skip_until_initial_step",
    "report_to": "log_with log_config log_tracker_name log_tracker_config log_prefix",
    "hub_model_id": "hf_repo_id huggingface_repo_id huggingface_path_in_repo",
    "push_to_hub": "push_checkpoints_to_hub push_to_hub_background save_state_to_huggingface async_upload",
    "config": "config_file",
}
# What needs no flag, with the reason.
ALWAYS = {
    "the one image is scaled to cover the size and cropped at its center": "center_crop crop crop_style "
    "image_interpolation_mode resize_interpolation crops_coords_top_left_h crops_coords_top_left_w video_reshape_mode",
    "the caption is the .txt beside the image": "caption_ext caption_extension caption_extention",
    "what is learned is the velocity, each timestep as much as another": "loss_type model_prediction_type "
    "prediction_type huber_c huber_scale huber_schedule snr_gamma min_snr_gamma use_soft_min_snr "
    "debiased_estimation_loss v_parameterization precondition_outputs do_edm_style_training",
    "the one image is learned in every step": "repeats num_repeats dataset_repeats",
    "one image needs no loader": "dataloader_num_workers max_data_loader_n_workers persistent_data_loader_workers "
    "dataloader_prefetch dataloader_prefetch_qlen compress_disk_cache streaming load_from_disk "
    "dataset_preprocess_batch_size vae_cache_scan_behaviour override_dataset_config data_backend_sampling",
    "image and captions are encoded once, and the encoders freed": "cache_latents_to_disk cache_text_encoder_outputs "
    "cache_text_encoder_outputs_to_disk cache_text_embeddings cache_dir_text cache_dir_vae unload_text_encoder "
    "vae_batch_size text_encoder_batch_size pre_compute_text_embeddings offload_during_startup cache_info "
    "skip_cache_check quantize_te qtype_te text_encoder_1_precision text_encoder_2_precision "
    "text_encoder_3_precision text_encoder_4_precision fp8_text_encoder fp8_t5 fp8_vl fp8_llm enable_slicing "
    "enable_vae_tiling enable_tiling vae_tiling vae_chunk_size vae_spatial_tile_sample_min_size fsdp_text_encoder "
    "remote_text_encoder vae_dtype text_encoder_dtype",
    "attention is torch's scaled_dot_product_attention": "enable_xformers_memory_efficient_attention xformers sdpa "
    "mem_eff_attn attention_mechanism flash_attn flash3 sage_attn split_attn enable_npu_flash_attention "
    "use_32bit_attention fuse_qkv_projections",
    "LoRA files are float32, in safetensors, whatever the base is": "upcast_before_saving save_precision save_dtype "
    "save_model_as save_format use_safetensors no_metadata skip_save_text_encoder lora_format",
    "it is a LoRA of the transformer": "train_unet network_module lora_type network_train_unet_only lora_init_type "
    "gaussian_init_lora network_type lora_initialisation_style",
    "the pipeline brings its parts": "vae ae clip_l clip_g t5xxl t5 clip text_encoder text_encoder1 text_encoder2 "
    "pretrained_vae_model_name_or_path pretrained_vae_name_or_path tokenizer_name vae_path "
    "pretrained_t5_model_name_or_path pretrained_text_encoder_4_name_or_path "
    "pretrained_tokenizer_4_name_or_path pretrained_tokenizer_name_or_path",
    "the pipeline itself is asked what it is": "arch is_flux is_v3 is_lumina is_lumina2 noise_scheduler "
    "model_version task bypass_guidance_embedding flux_guidance_mode flux_guidance_value model_flavour "
    "apply_t5_attn_mask flux_attention_masked_training text_encoder_use_attention_mask num_layers sampler",
    "the launcher says it": "local_rank device ddp_timeout ddp_static_graph ddp_gradient_as_bucket_view deepspeed "
    "zero_stage nccl_timeout num_processes gpu_ids",
    "gradients are always set to none and clipped by their norm": "set_grads_to_none grad_clip_method "
    "fused_backward_pass",
    "no warmup or cache of kernels is needed": "highvram cuda_cudnn_benchmark ccache disable_mmap_load_safetensors "
    "use_pinned_memory_for_block_swap disable_numpy_memmap offload_during_save",
    "the run's last lines are its report": "performance_log_every logging_steps profile_steps profile_memory "
    "disable_benchmark log_dataset_samples debug_loss",
    "prodigy is set up as diffusers' examples do": "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction "
    "prodigy_safeguard_warmup",
    "it names the other program's job": "job process version extension type",
}
# What is not done here, with the reason.
NOT_DONE = {
    "the one image is learned as it is": "random_flip flip_aug color_aug random_crop face_crop_aug_range "
    "random_scale minimum_image_size",
    "a caption is learned whole": "caption_dropout caption_dropout_rate caption_dropout_probability "
    "caption_dropout_every_n_epochs caption_tag_dropout_rate proportion_empty_prompts shuffle_caption shuffle_tokens "
    "keep_tokens caption_prefix caption_suffix cfg_dropout_prob enable_wildcard weighted_captions "
    "keep_tokens_separator trigger_word caption_strategy caption_separator secondary_separator",
    "a sampler is learned, not a subject, so there is no class to preserve": "with_prior_preservation class_data_dir "
    "class_prompt num_class_images prior_loss_weight prior_generation_precision sample_batch_size reg_data_dir",
    "text encoders are not trained": "train_text_encoder text_encoder_lr adam_weight_decay_text_encoder "
    "train_text_encoder_ti train_text_encoder_ti_frac train_text_encoder_frac token_abstraction initializer_concept "
    "num_new_tokens_per_abstraction enable_t5_ti train_transformer_frac network_train_text_encoder_only id_token",
    "the learning rate is the one that is given": "scale_lr lr_decay_steps lr_scheduler_timescale lr_scheduler_type "
    "lr_scheduler_args lr_scheduler_min_lr_ratio lr_end lr_scheduler_params",
    "noise is standard normal, as inference draws it": "noise_offset offset_noise input_perturbation ip_noise_gamma "
    "multires_noise_iterations multires_noise_discount adaptive_noise_scale noised_image_dropout "
    "noise_offset_random_strength ip_noise_gamma_random_strength zero_terminal_snr",
    "60 steps at a constant rate need no average": "use_ema ema_decay foreach_ema offload_ema non_ema_revision "
    "ema_update_interval ema_device",
    "LoRA in its plain form only, which every program loads": "use_dora use_lora_bias use_blora lycoris_config "
    "scale_weight_norms output_kohya_format init_lora network_weights base_weights base_weights_multiplier "
    "dim_from_weights assistant_lora_path",
    "no further image steers the base": "validation_image validation_images conditioning_image_column controlnet "
    "controlnet_model_name_or_path cond_image_column conditioning_data_dir masked_loss alpha_mask control_path "
    "ctrl_img ctrl_img_1 ctrl_img_2 ctrl_img_3",
    "a data set is read as it is by default, one row of it: see --dataset_index": "dataset_config_name",
    "validation draws as inference will, beside the base: see --validation_prompt": "skip_final_inference "
    "validation_resolution validation_num_inference_steps validation_seed validation_scheduler sample_sampler "
    "validation_disable_unconditional validation_torch_compile evaluation_type eval_steps_interval sample_steps "
    "sample_start_step skip_first_sample disable_sampling walk_seed sample_height sample_width validation_split "
    "sample_at_first",
    "trackers and the repository get names from --output_dir": "tracker_project_name tracker_run_name tracker_name "
    "wandb_run_name wandb_entity training_comment hf_private huggingface_repo_type huggingface_repo_visibility "
    "name hub_private_repo metadata_title metadata_author metadata_description metadata_license metadata_tags",
}
TOKENS = dict.fromkeys(
    "token hub_token hf_token huggingface_token auth_token use_auth_token access_token wandb_api_key".split(),
    "tokens are read from HF_TOKEN or the login of `hf auth login` alone (WANDB_API_KEY for wandb)",
)


def by_name(rows: dict[str, str], answer: str) -> dict[str, str]:
    """Return each name of the rows with its answer, in which %s is the row's text."""
    return {name: answer % text for text, names in rows.items() for name in names.split()}


ANSWERS = {
    **by_name(RENAMED, "give --%s"),
    **by_name(ALWAYS, "leave out (%s)"),
    **by_name(NOT_DONE, "leave out (%s)"),
    **TOKENS,
}
