//! The Hugging Face tensors that a Qwen2 arena is made of.

use crate::config::Qwen2Config;
use crate::layout::{TensorEntry, TensorRole};

/// A tensor that a Hugging Face Qwen2 checkpoint must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// `[outputs, inputs]` of a weight matrix, `[n]` of a bias or norm; row-major.
    pub shape: Vec<usize>,
}

impl SourceTensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// The tensors of a checkpoint, in the order in which the arena uses them. An index into this list is what
/// [`TensorSource`](crate::TensorSource) takes, and the order of the conversion report's records.
///
/// Tied models read `model.embed_tokens.weight` as their last tensor and have no `lm_head.weight`.
pub fn qwen2_source_tensors(cfg: &Qwen2Config) -> Vec<SourceTensor> {
    let hidden = cfg.hidden_size as usize;
    let intermediate = cfg.intermediate_size as usize;
    let vocab = cfg.vocab_size as usize;
    let (q, kv) = (cfg.attention_width(), cfg.kv_width());
    let tensor = |name: &str, shape: &[usize]| SourceTensor { name: name.to_owned(), shape: shape.to_vec() };

    let embedding = tensor("model.embed_tokens.weight", &[vocab, hidden]);
    let mut list = Vec::with_capacity(qwen2_source_count(cfg));
    if !cfg.tie_word_embeddings {
        list.push(embedding.clone());
    }
    for i in 0..cfg.num_layers {
        let of_layer = |name: &str, shape: &[usize]| tensor(&format!("model.layers.{i}.{name}"), shape);
        list.extend([
            of_layer("input_layernorm.weight", &[hidden]),
            of_layer("self_attn.q_proj.weight", &[q, hidden]),
            of_layer("self_attn.q_proj.bias", &[q]),
            of_layer("self_attn.k_proj.weight", &[kv, hidden]),
            of_layer("self_attn.k_proj.bias", &[kv]),
            of_layer("self_attn.v_proj.weight", &[kv, hidden]),
            of_layer("self_attn.v_proj.bias", &[kv]),
            of_layer("self_attn.o_proj.weight", &[hidden, q]),
            of_layer("post_attention_layernorm.weight", &[hidden]),
            of_layer("mlp.gate_proj.weight", &[intermediate, hidden]),
            of_layer("mlp.up_proj.weight", &[intermediate, hidden]),
            of_layer("mlp.down_proj.weight", &[hidden, intermediate]),
        ]);
    }
    list.push(tensor("model.norm.weight", &[hidden]));
    list.push(if cfg.tie_word_embeddings { embedding } else { tensor("lm_head.weight", &[vocab, hidden]) });
    list
}

const SOURCES_OF_LAYER: usize = 12;

/// Length of [`qwen2_source_tensors`].
pub fn qwen2_source_count(cfg: &Qwen2Config) -> usize {
    usize::from(!cfg.tie_word_embeddings) + SOURCES_OF_LAYER * cfg.num_layers as usize + 2
}

/// Consecutive columns of an arena tensor that come from the rows of one source matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Source of the weights, `[columns, k]`, or of a vector's values.
    pub weight: usize,
    /// Source of the biases, `[columns]`.
    pub bias: Option<usize>,
    /// Columns.
    pub columns: usize,
}

/// What an arena tensor is made of: one segment, three for QKV, two (of alternating panels) for gate and up.
pub(crate) fn segments(
    cfg: &Qwen2Config,
    tensor: &TensorEntry,
) -> impl Iterator<Item = Segment> + Clone + use<> {
    let untied = usize::from(!cfg.tie_word_embeddings);
    let layer = untied + SOURCES_OF_LAYER * tensor.layer.unwrap_or(cfg.num_layers) as usize;
    let plain =
        |index| [Some(Segment { weight: layer + index, bias: None, columns: tensor.n as usize }), None, None];
    let biased =
        |index, columns| Some(Segment { weight: layer + index, bias: Some(layer + index + 1), columns });
    let segments = match tensor.role {
        TensorRole::Embedding => {
            [Some(Segment { weight: 0, bias: None, columns: tensor.n as usize }), None, None]
        }
        TensorRole::AttnNorm => plain(0),
        TensorRole::Qkv => {
            [biased(1, cfg.attention_width()), biased(3, cfg.kv_width()), biased(5, cfg.kv_width())]
        }
        TensorRole::AttnOut => plain(7),
        TensorRole::MlpNorm => plain(8),
        TensorRole::GateUp => [plain(9)[0], plain(10)[0], None],
        TensorRole::Down => plain(11),
        // After the layers: the norm, then the LM head.
        TensorRole::FinalNorm => plain(0),
        TensorRole::LmHead => plain(1),
    };
    segments.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{TensorKind, qwen2_weights_layout};
    use crate::test_model::{QWEN2_0_5B, TINY};

    #[test]
    fn segments_use_every_source_once_with_its_shape() {
        for cfg in [QWEN2_0_5B, TINY] {
            let sources = qwen2_source_tensors(&cfg);
            assert_eq!(sources.len(), qwen2_source_count(&cfg));
            let mut used = Vec::new();
            for tensor in qwen2_weights_layout(&cfg).tensors(&cfg) {
                for segment in segments(&cfg, &tensor) {
                    let matrix = [segment.columns, tensor.k as usize];
                    let shape = if tensor.kind == TensorKind::Vector { &matrix[..1] } else { &matrix[..] };
                    assert_eq!(sources[segment.weight].shape, shape, "{tensor}");
                    used.push(segment.weight);
                    if let Some(bias) = segment.bias {
                        assert_eq!(sources[bias].shape, [segment.columns]);
                        assert_eq!(
                            sources[bias].name,
                            sources[segment.weight].name.replace("weight", "bias")
                        );
                        used.push(bias);
                    }
                }
            }
            assert_eq!(used, (0..sources.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn names_of_checkpoint() {
        let tied = qwen2_source_tensors(&QWEN2_0_5B);
        assert_eq!(tied[0].name, "model.layers.0.input_layernorm.weight");
        assert_eq!(tied[12 * 23 + 7].name, "model.layers.23.self_attn.o_proj.weight");
        assert_eq!(tied[12 * 24 + 1].name, "model.embed_tokens.weight");
        let untied = qwen2_source_tensors(&TINY);
        assert_eq!(untied[0].name, "model.embed_tokens.weight");
        assert_eq!(untied[26].name, "lm_head.weight");
        assert_eq!(untied[26].elements(), 70 * 40);
    }
}
