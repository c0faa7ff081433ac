//! Configs that the tests share.

use crate::config::Qwen2Config;
use crate::fingerprint::FINGERPRINT_CONFIG;

/// Qwen2.5-0.5B: tied, GQA 7:1.
pub const QWEN2_0_5B: Qwen2Config = Qwen2Config {
    hidden_size: 896,
    intermediate_size: 4864,
    num_layers: 24,
    num_heads: 14,
    num_kv_heads: 2,
    head_dim: 64,
    vocab_size: 151936,
    max_position_embeddings: 32768,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: true,
};

/// Qwen2.5-72B: untied, GQA 8:1.
pub const QWEN2_72B: Qwen2Config = Qwen2Config {
    hidden_size: 8192,
    intermediate_size: 29568,
    num_layers: 80,
    num_heads: 64,
    num_kv_heads: 8,
    head_dim: 128,
    vocab_size: 152064,
    tie_word_embeddings: false,
    ..QWEN2_0_5B
};

/// Small: no size is a multiple of 32, and Q, K and V meet inside a panel.
pub const TINY: Qwen2Config = FINGERPRINT_CONFIG;
