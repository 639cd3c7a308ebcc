# ruff: noqa: C408
"""A small configuration of each architecture that mlx-lm ships: what a family's config.json would say, in small sizes.

Most families ask for the same keys, so each entry of ``CONFIGURATIONS`` says only its own. ``DENSE`` goes under
every entry, ``MIXTURE``, ``LATENT``, ``DELTA`` and ``MAMBA`` under those that name them. Sizes are multiples of 32 so
that weights can be quantised, and different from each other where a mistake would hide in equal ones.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

VOCABULARY = 512
WINDOW = 16

DENSE: Config = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    layer_norm_eps=1e-5,
    layer_norm_epsilon=1e-5,
    layernorm_epsilon=1e-5,
    norm_epsilon=1e-5,
    norm_eps=1e-5,
    vocab_size=VOCABULARY,
    max_position_embeddings=1024,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    attention_bias=False,
    mlp_bias=False,
    use_bias=False,
)
# A feed-forward layer of several experts, of which a router picks some for each token.
MIXTURE: Config = dict(
    moe_intermediate_size=32,
    num_experts_per_tok=2,
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    n_shared_experts=1,
    num_shared_experts=1,
    shared_expert_intermediate_size=32,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    first_k_dense_replace=1,
    moe_layer_freq=1,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    scoring_func="sigmoid",
    topk_method="noaux_tc",
)
# Attention over a compressed representation of keys and values; a value is narrower than a key.
LATENT: Config = dict(
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=32,
    v_head_dim=16,
)
# Linear attention by a gated delta rule.
DELTA: Config = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
)
# A state-space mixer, under the names that hybrids of attention and mixers use.
MAMBA: Config = dict(
    mamba_d_conv=4,
    mamba_d_state=16,
    mamba_expand=2,
    mamba_proj_bias=False,
    mamba_conv_bias=True,
    mamba_n_groups=1,
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_num_heads=8,
    mamba_head_dim=16,
    mamba_d_ssm=128,
    conv_kernel=4,
    use_conv_bias=True,
    state_size=16,
    ssm_state_size=16,
    n_groups=1,
)
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
ROPE: Config = {"rope_type": "default", "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
YARN: Config = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONG_ROPE: Config = {
    "type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "short_mscale": 1.2,
    "long_mscale": 1.2,
    "original_max_position_embeddings": 256,
}


def mixture(**own: Any) -> Config:
    return {**MIXTURE, **own}


def latent(**own: Any) -> Config:
    return {**LATENT, **own}


def latent_mixture(**own: Any) -> Config:
    return {**MIXTURE, **LATENT, **own}


def delta(**own: Any) -> Config:
    return {**DELTA, **own}


def mamba(**own: Any) -> Config:
    return {**MAMBA, **own}


def wrapped(inner: str, **own: Any) -> Config:
    """A model of text and images: the language model's configuration is nested, under ``text_config``."""
    return dict(text_config={**DENSE, "model_type": inner, **own})


_GPT2: Config = dict(n_embd=64, n_head=4, n_layer=2, n_positions=1024, n_ctx=1024)
_GRANITE: Config = dict(
    intermediate_size=128,
    logits_scaling=4.0,
    attention_multiplier=0.1,
    embedding_multiplier=6.0,
    residual_multiplier=0.3,
)
_GEMMA3: Config = dict(query_pre_attn_scalar=16, sliding_window=WINDOW, sliding_window_pattern=2)
_GEMMA4: Config = dict(
    global_head_dim=32,
    num_hidden_layers=4,
    vocab_size_per_layer_input=VOCABULARY,
    num_kv_shared_layers=1,
    hidden_size_per_layer_input=32,
    sliding_window=WINDOW,
    layer_types=SLIDING_THEN_FULL * 2,
    use_double_wide_mlp=False,
)
_SPARSE_ATTENTION: Config = dict(index_head_dim=32, index_n_heads=2, index_topk=WINDOW)
_BAILING: Config = dict(use_qk_norm=True, use_qkv_bias=True, rope_interleave=True, group_norm_size=1)
_CONVOLUTION: Config = dict(
    conv_bias=False,
    conv_L_cache=3,
    block_dim=64,
    block_ff_dim=96,
    block_multiple_of=32,
    block_ffn_dim_multiplier=1.0,
    block_auto_adjust_ff_dim=False,
    layer_types=["conv", "full_attention"],
    full_attn_idxs=[1],
)
_LONGCAT: Config = dict(
    attention_method="MLA",
    zero_expert_type="identity",
    zero_expert_num=1,
    ffn_hidden_size=96,
    expert_ffn_hidden_size=32,
    moe_topk=2,
    num_layers=2,
    mla_scale_q_lora=True,
    mla_scale_kv_lora=True,
)
_KIMI_LINEAR: Config = dict(
    linear_attn_config=dict(kda_layers=[1], full_attn_layers=[2], num_heads=2, head_dim=32, short_conv_kernel_size=4),
    num_experts_per_token=2,
    model_max_length=1024,
)

CONFIGURATIONS: dict[str, Config] = {
    "Klear": mixture(),
    "afm7": dict(
        hidden_dim=64, num_layers=3, num_kv_reuse_layers=1, num_heads=4, num_kv_heads=2, hidden_dim_scale_factor=1.5
    ),
    "afmoe": mixture(layer_types=SLIDING_THEN_FULL, sliding_window=WINDOW, num_dense_layers=1, score_func="sigmoid"),
    "apertus": dict(post_norm=False, qk_norm=True),
    "baichuan_m1": dict(tie_word_embeddings=False, sliding_window=WINDOW, sliding_window_layers=[0], conv_window=2),
    "bailing_hybrid": latent_mixture(layer_group_size=2, **_BAILING),
    "bailing_moe": mixture(**_BAILING),
    "bailing_moe_linear": mixture(layer_group_size=2, num_key_value_heads=4, partial_rotary_factor=0.5, **_BAILING),
    "bailing_moe_v3": latent_mixture(
        num_experts=8,
        n_group=4,
        topk_group=2,
        layer_group_size=2,
        moe_shared_expert_intermediate_size=32,
        model_type="bailing_hybrid",
        architectures=["BailingMoeV3ForCausalLM"],
        head_dim=32,
    ),
    "bitnet": {},
    "cohere": dict(logit_scale=0.25),
    "cohere2": dict(sliding_window=WINDOW, sliding_window_pattern=2, logit_scale=0.25),
    "dbrx": dict(
        d_model=64,
        n_layers=2,
        n_heads=4,
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
    ),
    "deepseek": mixture(),
    "deepseek_v2": latent_mixture(topk_method="greedy", rope_scaling=YARN),
    "deepseek_v3": latent_mixture(),
    "deepseek_v32": latent_mixture(**_SPARSE_ATTENTION),
    "deepseek_v41": latent_mixture(
        num_hidden_layers=3,
        scoring_func="sqrtsoftplus",
        o_groups=2,
        o_lora_rank=32,
        sliding_window=WINDOW,
        compress_ratios=[0, 4, 4],
        kv_source_layer_ids=[1],
        index_source_layer_ids=[1],
        hc_mult=2,
        hc_sinkhorn_iters=4,
        **{**_SPARSE_ATTENTION, "index_topk": 4},
    ),
    "dots1": mixture(),
    "ernie4_5": {},
    "ernie4_5_moe": mixture(moe_num_experts=4, moe_layer_start_index=1, moe_k=2, moe_num_shared_experts=1),
    "exaone": dict(num_layers=2),
    "exaone4": dict(
        layer_types=SLIDING_THEN_FULL, sliding_window=WINDOW, sliding_window_pattern="LG", rope_scaling=None
    ),
    "exaone_moe": mixture(layer_types=SLIDING_THEN_FULL, sliding_window=WINDOW, is_moe_layer=[False, True]),
    "falcon_h1": mamba(rope_theta=10000.0, lm_head_multiplier=0.5),
    # Its blocks of kind conv_mixer are left out: transformers 5 refuses a config.json that names them.
    "gear": dict(
        layer_types=SLIDING_THEN_FULL,
        sliding_window=WINDOW,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma": {},
    "gemma2": dict(query_pre_attn_scalar=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
    "gemma3": wrapped("gemma3_text", **_GEMMA3),
    "gemma3_text": _GEMMA3,
    "gemma3n": wrapped(
        "gemma3n_text",
        num_hidden_layers=4,
        num_kv_shared_layers=1,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=WINDOW,
        rope_local_base_freq=10000.0,
        final_logit_softcapping=30.0,
        layer_types=SLIDING_THEN_FULL * 2,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        hidden_size_per_layer_input=32,
        altup_num_inputs=2,
        altup_coef_clip=120.0,
        altup_correct_scale=True,
        altup_active_idx=0,
        laurel_rank=16,
    ),
    "gemma4": wrapped("gemma4_text", **_GEMMA4),
    "gemma4_text": _GEMMA4,
    "glm": {},
    "glm4": dict(partial_rotary_factor=0.5),
    "glm4_moe": mixture(use_qk_norm=True, partial_rotary_factor=0.5, rope_scaling=None),
    "glm4_moe_lite": latent_mixture(),
    "glm_moe_dsa": latent_mixture(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, **_SPARSE_ATTENTION),
    "gpt2": _GPT2,
    "gpt_bigcode": dict(n_inner=96, **_GPT2),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gpt_oss": mixture(sliding_window=WINDOW, rope_scaling=YARN, layer_types=SLIDING_THEN_FULL, intermediate_size=32),
    "gptj": dict(rotary_dim=8, **_GPT2),
    "granite": _GRANITE,
    "granitemoe": mixture(**_GRANITE),
    "granitemoehybrid": {
        **MIXTURE,
        **MAMBA,
        **_GRANITE,
        "intermediate_size": 32,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"],
        "position_embedding_type": "nope",
    },
    "helium": {},
    "hunyuan": mixture(
        moe_topk=2,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    ),
    "hunyuan_v1_dense": dict(rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0}),
    "internlm2": dict(bias=False),
    "internlm3": {},
    "iquestloopcoder": dict(loop_num=2, loop_window_size=WINDOW),
    "jamba": {
        **MIXTURE,
        **MAMBA,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_dt_rank": 8,
    },
    "kimi_k25": wrapped("deepseek_v3", **latent_mixture()),
    "kimi_k3": wrapped(
        "kimi_linear",
        **latent_mixture(
            **_KIMI_LINEAR, activation_situ_beta=1.0, activation_situ_linear_beta=1.0, attn_res_block_size=1
        ),
    ),
    "kimi_linear": latent_mixture(**_KIMI_LINEAR),
    "kimi_vl": wrapped("deepseek_v3", **latent_mixture()),
    "laguna": mixture(
        layer_types=SLIDING_THEN_FULL,
        sliding_window=WINDOW,
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
    ),
    "lfm2": _CONVOLUTION,
    "lfm2-vl": wrapped("lfm2", **_CONVOLUTION),
    "lfm2_moe": mixture(use_expert_bias=True, num_dense_layers=1, **_CONVOLUTION),
    "lille-130m": dict(block_size=1024, n_embd=64, n_head=4, n_kv_heads=2, n_layer=2),
    "llama": {},
    "llama4": wrapped(
        "llama4_text",
        **mixture(
            attention_chunk_size=WINDOW,
            num_hidden_layers=4,
            interleave_moe_layer_step=2,
            intermediate_size=32,
            intermediate_size_mlp=96,
            num_experts_per_tok=1,
            rope_scaling=None,
            use_qk_norm=True,
            attn_temperature_tuning=True,
            floor_scale=WINDOW,
        ),
    ),
    "llama4_text": dict(intermediate_size_mlp=96, no_rope_layers=[1, 0], use_qk_norm=True),
    "longcat_flash": latent_mixture(**_LONGCAT),
    "longcat_flash_ngram": latent_mixture(**_LONGCAT, ngram_vocab_size_ratio=2, emb_neighbor_num=3, emb_split_num=2),
    "mamba": mamba(intermediate_size=128, time_step_rank=8),
    "mamba2": mamba(num_heads=8, intermediate_size=128, time_step_limit=[0.0, 100.0], time_step_rank=8),
    "mellum": mixture(
        layer_types=SLIDING_THEN_FULL,
        sliding_window=WINDOW,
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
    ),
    "mimo": dict(num_nextn_predict_layers=1),
    "mimo_v2_flash": mixture(
        hybrid_layer_pattern=[0, 1],
        moe_layer_freq=[0, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=WINDOW,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        head_dim=32,
        v_head_dim=16,
        swa_head_dim=32,
        swa_v_head_dim=16,
        partial_rotary_factor=0.5,
    ),
    "minicpm": dict(tie_word_embeddings=False, dim_model_base=32, scale_depth=1.4, scale_emb=4.0),
    "minicpm3": latent(
        tie_word_embeddings=False,
        rope_scaling=LONG_ROPE,
        dim_model_base=32,
        scale_depth=1.4,
        scale_emb=4.0,
        v_head_dim=16,
    ),
    "minimax": mixture(shared_intermediate_size=32, rotary_dim=8, intermediate_size=32),
    "minimax_m3_vl": wrapped(
        "minimax_m3",
        **mixture(
            intermediate_size=32,
            dense_intermediate_size=96,
            shared_intermediate_size=32,
            moe_layer_freq=[0, 1],
            sparse_attention_config=dict(
                sparse_num_index_heads=2,
                sparse_index_dim=16,
                sparse_block_size=4,
                sparse_topk_blocks=4,
                sparse_local_block=1,
                sparse_attention_freq=[0, 1],
            ),
        ),
    ),
    "ministral3": dict(rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
    "mistral3": wrapped("mistral"),
    "mistral4": latent_mixture(rope_parameters={**YARN, "llama_4_scaling_beta": 0.1}),
    "mixtral": mixture(),
    "muse_glimmer": dict(layer_types=SLIDING_THEN_FULL, sliding_window=WINDOW, post_norm_eps=1e-6),
    "muse_spark": wrapped(
        "muse_spark_text",
        **mixture(
            num_shared_experts=0,
            moe_hidden_size=32,
            layer_types=SLIDING_THEN_FULL,
            sliding_window=WINDOW,
            layer_rope_theta=[10000.0, 0.0],
            rope_parameters=ROPE,
            post_norm_eps=1e-6,
            final_logit_softcapping=20.0,
            output_multiplier=0.5,
            mlp_layer_types=["sparse", "sparse"],
        ),
    ),
    "nanbeige": dict(num_loops=2),
    "nanochat": {},
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(
        num_hidden_layers=3,
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
        ],
    ),
    "nemotron_h": {
        **MIXTURE,
        **MAMBA,
        "hybrid_override_pattern": ["M", "*", "E", "-"],
        "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo": dict(d_model=64, n_layers=2, mlp_hidden_size=192, n_heads=4, embedding_size=VOCABULARY),
    "olmo2": {},
    "olmo3": dict(layer_types=SLIDING_THEN_FULL, sliding_window=WINDOW),
    "olmo_hybrid": delta(layer_types=LINEAR_THEN_FULL, linear_num_key_heads=4, linear_allow_neg_eigval=True),
    "olmoe": mixture(),
    "openelm": dict(
        num_transformer_layers=2,
        model_dim=64,
        ffn_dim_divisor=32,
        num_query_heads=[4, 4],
        num_kv_heads=[2, 2],
        ffn_multipliers=[1.5, 2.0],
    ),
    "phi": dict(partial_rotary_factor=0.5),
    "phi3": {},
    # Its model bans tokens 100256 and above by name.
    "phi3small": dict(vocab_size=100352, dense_attention_every_n_layers=2, ff_intermediate_size=96, gegelu_limit=20.0),
    "phimoe": mixture(rope_scaling={**LONG_ROPE, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}),
    "phixtral": mixture(num_vocab=VOCABULARY, model_dim=64, num_heads=4, num_layers=2, rotary_dim=8),
    "pixtral": wrapped("mistral"),
    "plamo": dict(n_shared_head=2),
    "plamo2": mamba(hidden_size_per_head=16, attention_window_size=WINDOW, full_attention_idx=[1], mamba_step=2),
    "plamo3": dict(window_size=WINDOW, sliding_window_pattern=2),
    "prism_hadamard_qwen35": wrapped("qwen3_5_text", **delta(full_attention_interval=2, rope_parameters=ROPE)),
    "qwen": dict(kv_channels=16, intermediate_size=192),
    "qwen2": {},
    "qwen2_moe": mixture(),
    "qwen2_vl": wrapped("qwen2"),
    "qwen3": {},
    "qwen3_5": wrapped("qwen3_5_text", **delta(full_attention_interval=2, rope_parameters=ROPE)),
    "qwen3_5_moe": wrapped("qwen3_5_moe_text", **mixture(**DELTA, full_attention_interval=2, rope_parameters=ROPE)),
    "qwen3_moe": mixture(),
    "qwen3_next": mixture(**DELTA, full_attention_interval=2, partial_rotary_factor=0.5),
    "qwen3_vl": wrapped("qwen3_vl_text"),
    "qwen3_vl_moe": wrapped("qwen3_vl_moe_text", **mixture(tie_word_embeddings=False)),
    "recurrent_gemma": dict(
        conv1d_width=4,
        logits_soft_cap=30.0,
        attention_window_size=WINDOW,
        num_key_value_heads=1,
        num_hidden_layers=2,
        block_types=["recurrent", "attention"],
    ),
    "rwkv7": dict(head_dim=32, a_low_rank_dim=32, v_low_rank_dim=32, gate_low_rank_dim=32, decay_low_rank_dim=32),
    "seed_oss": {},
    "smollm3": dict(no_rope_layer_interval=2),
    "solar_open": mixture(partial_rotary_factor=0.5, use_qk_norm=True),
    "spark2_5": dict(
        layer_types=SLIDING_THEN_FULL,
        sliding_window=WINDOW,
        rope_parameters={"sliding_attention": ROPE, "full_attention": ROPE},
    ),
    "stablelm": dict(use_qkv_bias=True, partial_rotary_factor=0.5),
    "starcoder2": {},
    "step3p5": dict(
        num_attention_groups=2,
        sliding_window=WINDOW,
        layer_types=SLIDING_THEN_FULL,
        moe_num_experts=4,
        moe_top_k=2,
        moe_intermediate_size=32,
        share_expert_dim=32,
        moe_layers_enum="1",
    ),
    "talkie": dict(num_key_value_heads=4),
    "telechat3": {},
    "youtu_llm": latent(),
}
