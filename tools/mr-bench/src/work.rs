//! How much work a forward pass is, by the config alone.

use mruntime::{Qwen2Config, Stage};

/// What one operation must do at least.
#[derive(Clone, Copy, Default, PartialEq, Debug)]
pub struct Work {
    /// Bytes of weights and KV cache to be read, each once.
    pub bytes: f64,
    /// Floating-point operations of products, two per multiply-add.
    pub flops: f64,
}

/// The work of one operation on `tokens` tokens from `position` on: none for operations on rows, which are no products.
pub fn stage_work(cfg: &Qwen2Config, stage: Stage, position: usize, tokens: usize) -> Work {
    let layout = mrt_format::qwen2_weights_layout(cfg);
    let (hidden, mlp, heads) =
        (cfg.hidden_size as usize, cfg.intermediate_size as usize, cfg.attention_width());
    let product = |span: mrt_format::Span, inputs: usize, outputs: usize| Work {
        bytes: span.bytes as f64,
        flops: 2.0 * (inputs * outputs * tokens) as f64,
    };
    match stage {
        Stage::Qkv => product(layout.layer0.qkv, hidden, cfg.qkv_columns()),
        Stage::AttnOut => product(layout.layer0.attn_out, heads, hidden),
        Stage::GateUp => product(layout.layer0.gate_up, hidden, 2 * mlp),
        Stage::Down => product(layout.layer0.down, mlp, hidden),
        Stage::LmHead => product(layout.lm_head, hidden, cfg.vocab_size as usize),
        Stage::Attention => Work {
            bytes: (2 * size_of::<u16>() * (cfg.num_kv_heads * cfg.head_dim) as usize * (position + tokens))
                as f64,
            flops: 4.0 * heads as f64 * positions_read(position, tokens),
        },
        Stage::Embed | Stage::AttnNorm | Stage::Rope | Stage::MlpNorm | Stage::FinalNorm => Work::default(),
    }
}

/// Floating-point operations of a prefill of `tokens` tokens after `depth` others, two per multiply-add: all products,
/// attention over the positions that each token sees, and the LM head for the last token.
pub fn prefill_flops(cfg: &Qwen2Config, depth: usize, tokens: usize) -> f64 {
    let (hidden, mlp) = (f64::from(cfg.hidden_size), f64::from(cfg.intermediate_size));
    let (layers, attention) = (f64::from(cfg.num_layers), cfg.attention_width() as f64);
    let products = hidden * cfg.qkv_columns() as f64 + attention * hidden + 3.0 * hidden * mlp;
    // Scores and weighted values: each position is met by every element of the queries twice.
    let positions = positions_read(depth, tokens);
    let lm_head = hidden * f64::from(cfg.vocab_size);
    2.0 * (layers * (products * tokens as f64 + 2.0 * attention * positions) + lm_head)
}

/// Bytes that must be read to decode `tokens` tokens, one by one, after `depth` others: all weights but an embedding
/// table of its own (one row of which is read), and the keys and values of all positions so far.
pub fn decode_bytes(cfg: &Qwen2Config, depth: usize, tokens: usize) -> f64 {
    let layout = mrt_format::qwen2_weights_layout(cfg);
    let weights = layout.arena_bytes - layout.embedding.map_or(0, |span| span.bytes);
    let position = 2 * size_of::<u16>() * (cfg.num_layers * cfg.num_kv_heads * cfg.head_dim) as usize;
    weights as f64 * tokens as f64 + position as f64 * positions_read(depth, tokens)
}

/// Positions that `tokens` tokens after `depth` others see in all: each one those before it and itself.
fn positions_read(depth: usize, tokens: usize) -> f64 {
    let (depth, tokens) = (depth as f64, tokens as f64);
    tokens * depth + tokens * (tokens + 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Qwen2.5-0.5B.
    const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 896,
        intermediate_size: 4864,
        num_layers: 24,
        num_heads: 14,
        num_kv_heads: 2,
        head_dim: 64,
        vocab_size: 151_936,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: true,
    };

    #[test]
    fn one_token_costs_two_operations_a_parameter_and_its_attention() {
        // 494,032,768 parameters are published; less 24 * 2 + 1 norms and 24 * 1152 biases they are the matrices.
        let matrices = 494_032_768.0 - 49.0 * 896.0 - 24.0 * 1152.0;
        let attention = |positions: f64| 24.0 * 14.0 * 64.0 * 2.0 * positions;
        assert_eq!(prefill_flops(&CFG, 0, 1), 2.0 * (matrices + attention(1.0)));
        assert_eq!(prefill_flops(&CFG, 99, 1), 2.0 * (matrices + attention(100.0)));
    }

    /// The work of all operations of a forward pass that gives the logits of the last token.
    fn pass(position: usize, tokens: usize) -> Work {
        let layers =
            [Stage::Embed, Stage::AttnNorm, Stage::Qkv, Stage::Rope, Stage::Attention, Stage::AttnOut]
                .into_iter()
                .chain([Stage::MlpNorm, Stage::GateUp, Stage::Down])
                .map(|stage| stage_work(&CFG, stage, position, tokens));
        let (mut bytes, mut flops) = (0.0, 0.0);
        for work in layers {
            (bytes, flops) = (bytes + 24.0 * work.bytes, flops + 24.0 * work.flops);
        }
        let lm_head = stage_work(&CFG, Stage::LmHead, position + tokens - 1, 1);
        Work { bytes: bytes + lm_head.bytes, flops: flops + lm_head.flops }
    }

    #[test]
    fn the_operations_make_up_the_pass() {
        assert_eq!(pass(1000, 512).flops, prefill_flops(&CFG, 1000, 512));
        // The norms, 49 of 896 FP16 weights, are all that is missing.
        let (bytes, norms) = (decode_bytes(&CFG, 1000, 1), 49.0 * 896.0 * 2.0);
        assert!((bytes - norms - pass(1000, 1).bytes).abs() < 49.0 * 64.0, "{bytes}");
    }

    #[test]
    fn a_prefill_is_its_tokens_one_by_one_without_their_lm_heads() {
        let one_by_one: f64 = (0..512).map(|i| prefill_flops(&CFG, 1000 + i, 1)).sum();
        let lm_heads = 511.0 * 2.0 * 896.0 * 151_936.0;
        assert_eq!(prefill_flops(&CFG, 1000, 512), one_by_one - lm_heads);
    }

    #[test]
    fn decoding_reads_every_parameter_and_the_cache() {
        let (read, parameters) = (decode_bytes(&CFG, 0, 1), 2.0 * 494_032_768.0);
        // The panels' bias rows, of which the products other than QKV have no use, are the rest.
        assert!(read > parameters && read < 1.002 * parameters, "{read}");
        let position = 24.0 * 2.0 * 64.0 * 2.0 * 2.0;
        assert_eq!(decode_bytes(&CFG, 4096, 1) - read, 4096.0 * position);
        assert_eq!(decode_bytes(&CFG, 10, 2), 2.0 * read + (10.0 + 11.0) * position);

        let untied = Qwen2Config { tie_word_embeddings: false, ..CFG };
        assert_eq!(decode_bytes(&untied, 0, 1), read);
    }
}
