//! The shape of a Qwen2 model: everything that the arena layout and the forward pass depend on.

use std::fmt;

/// Architecture number of Qwen2 in the header of a `.mrt` file.
pub const ARCHITECTURE_QWEN2: u32 = 1;

/// Shape and constants of a Qwen2 model, named as in Hugging Face's `config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Qwen2Config {
    /// Width of the residual stream (`hidden_size`).
    pub hidden_size: u32,
    /// Width of the SwiGLU layer (`intermediate_size`).
    pub intermediate_size: u32,
    /// Number of decoder layers (`num_hidden_layers`).
    pub num_layers: u32,
    /// Number of query heads (`num_attention_heads`).
    pub num_heads: u32,
    /// Number of key and value heads (`num_key_value_heads`); divides `num_heads`.
    pub num_kv_heads: u32,
    /// Width of one head; even, because RoPE rotates pairs.
    pub head_dim: u32,
    /// Number of token ids, rows of the embedding (`vocab_size`).
    pub vocab_size: u32,
    /// Longest context that the model was trained for, in tokens (`max_position_embeddings`).
    pub max_position_embeddings: u32,
    /// The constant inside RMSNorm's square root (`rms_norm_eps`).
    pub rms_norm_eps: f64,
    /// Base of RoPE's wavelengths (`rope_theta`).
    pub rope_theta: f64,
    /// Whether the LM head is the embedding (`tie_word_embeddings`).
    pub tie_word_embeddings: bool,
}

/// A field of a [`Qwen2Config`] outside its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Name of the field, as in [`Qwen2Config`].
    pub field: &'static str,
    /// The value found.
    pub value: String,
    /// What the field must be.
    pub expected: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}, must be {}", self.field, self.value, self.expected)
    }
}

impl std::error::Error for ConfigError {}

impl Qwen2Config {
    /// Checks every field against the limits of the format, in the order of declaration.
    ///
    /// After it no size computed from the config overflows a `u64`: the largest arena has fewer than 2^50
    /// bytes.
    ///
    /// # Errors
    /// The first field that is outside its range, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let ranges = [
            ("hidden_size", self.hidden_size, 1, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1, 1 << 20),
            ("num_layers", self.num_layers, 1, 1 << 10),
            ("num_heads", self.num_heads, 1, 1 << 10),
            ("num_kv_heads", self.num_kv_heads, 1, self.num_heads),
            ("head_dim", self.head_dim, 2, 512),
            ("vocab_size", self.vocab_size, 1, 1 << 24),
            ("max_position_embeddings", self.max_position_embeddings, 1, 1 << 27),
        ];
        for (field, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(config_error(field, value, format!("from {low} to {high}")));
            }
            if field == "num_kv_heads" && !self.num_heads.is_multiple_of(value) {
                return Err(config_error(
                    field,
                    value,
                    format!("a divisor of num_heads = {}", self.num_heads),
                ));
            }
            if field == "head_dim" && !value.is_multiple_of(2) {
                return Err(config_error(field, value, "even".to_owned()));
            }
        }
        // Outside this range the constant would vanish in f32 or swamp what it protects.
        if !(1e-12..=1.0).contains(&self.rms_norm_eps) {
            return Err(config_error("rms_norm_eps", self.rms_norm_eps, "from 1e-12 to 1".to_owned()));
        }
        if !(1.0..=1e12).contains(&self.rope_theta) {
            return Err(config_error("rope_theta", self.rope_theta, "from 1 to 1e12".to_owned()));
        }
        Ok(())
    }

    /// Width of all query heads together, `num_heads * head_dim`: columns of Q, inputs of the output
    /// projection.
    pub fn attention_width(&self) -> usize {
        self.num_heads as usize * self.head_dim as usize
    }

    /// Width of all key (or value) heads together, `num_kv_heads * head_dim`.
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads as usize * self.head_dim as usize
    }

    /// Columns of the fused Q, K and V product, in this order.
    pub fn qkv_columns(&self) -> usize {
        self.attention_width() + 2 * self.kv_width()
    }
}

fn config_error(field: &'static str, value: impl ToString, expected: String) -> ConfigError {
    ConfigError { field, value: value.to_string(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::{QWEN2_0_5B, QWEN2_72B};

    #[test]
    fn real_models_pass() {
        QWEN2_0_5B.validate().unwrap();
        QWEN2_72B.validate().unwrap();
        assert_eq!(QWEN2_0_5B.qkv_columns(), 896 + 2 * 128);
        assert_eq!(QWEN2_72B.qkv_columns(), 8192 + 2 * 1024);
    }

    #[test]
    fn every_field_has_limits() {
        type Change = fn(&mut Qwen2Config);
        let cases: [(&str, &str, Change); 23] = [
            ("hidden_size", "0", |c| c.hidden_size = 0),
            ("hidden_size", "65537", |c| c.hidden_size = 65537),
            ("intermediate_size", "0", |c| c.intermediate_size = 0),
            ("intermediate_size", "1048577", |c| c.intermediate_size = (1 << 20) + 1),
            ("num_layers", "0", |c| c.num_layers = 0),
            ("num_layers", "1025", |c| c.num_layers = 1025),
            ("num_heads", "0", |c| c.num_heads = 0),
            ("num_heads", "1025", |c| c.num_heads = 1025),
            ("num_kv_heads", "0", |c| c.num_kv_heads = 0),
            ("num_kv_heads", "28", |c| c.num_kv_heads = 28),
            ("num_kv_heads", "3", |c| c.num_kv_heads = 3),
            ("head_dim", "0", |c| c.head_dim = 0),
            ("head_dim", "7", |c| c.head_dim = 7),
            ("head_dim", "514", |c| c.head_dim = 514),
            ("vocab_size", "0", |c| c.vocab_size = 0),
            ("vocab_size", "16777217", |c| c.vocab_size = (1 << 24) + 1),
            ("max_position_embeddings", "0", |c| c.max_position_embeddings = 0),
            ("max_position_embeddings", "134217729", |c| c.max_position_embeddings = (1 << 27) + 1),
            ("rms_norm_eps", "0", |c| c.rms_norm_eps = 0.0),
            ("rms_norm_eps", "NaN", |c| c.rms_norm_eps = f64::NAN),
            ("rms_norm_eps", "2", |c| c.rms_norm_eps = 2.0),
            ("rope_theta", "inf", |c| c.rope_theta = f64::INFINITY),
            ("rope_theta", "0.5", |c| c.rope_theta = 0.5),
        ];
        for (field, value, change) in cases {
            let mut config = QWEN2_0_5B;
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert_eq!((error.field, error.value.as_str()), (field, value));
            assert!(error.to_string().starts_with(&format!("{field} is {value}, must be ")));
        }
    }
}
