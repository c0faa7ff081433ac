//! Every offset of the weight arena, as a pure function of the config.
//!
//! The arena holds the tensors in the order in which a forward pass uses them, without gaps: the embedding
//! (untied models only), then per layer attention norm, QKV, attention output, MLP norm, gate and up, down;
//! then the final norm and the LM head (which is also the embedding of tied models). Every tensor is a whole
//! number of 64-byte rows.

use std::fmt;

use crate::config::Qwen2Config;

/// Columns of a panel: one row of a panel is 32 FP16 values, one cache line of 64 bytes.
pub const PANEL: usize = 32;

/// Bytes of one row of a panel, and the alignment of every tensor in the arena.
pub const ROW_BYTES: usize = 2 * PANEL;

/// Bytes of one panel of a matrix with `k` inputs: a row of biases, then `k` rows of weights.
pub const fn panel_bytes(k: usize) -> u64 {
    ROW_BYTES as u64 * (k as u64 + 1)
}

/// Bytes of the panels of a matrix with `k` inputs and `n` outputs: `64 * (k + 1) * ceil(n / 32)`.
pub const fn panels_bytes(k: usize, n: usize) -> u64 {
    panel_bytes(k) * n.div_ceil(PANEL) as u64
}

/// Bytes of a vector of `n` FP16 values, padded with zeros to a multiple of 32 values.
pub const fn vector_bytes(n: usize) -> u64 {
    ROW_BYTES as u64 * n.div_ceil(PANEL) as u64
}

/// A range of bytes within the arena; both numbers are multiples of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte, counted from the start of the arena.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Span {
    /// One past the last byte.
    pub const fn end(&self) -> u64 {
        self.offset + self.bytes
    }

    const fn shifted(self, by: u64) -> Span {
        Span { offset: self.offset + by, bytes: self.bytes }
    }
}

/// Where the tensors of one decoder layer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerLayout {
    /// RMSNorm weights before attention, vector `[hidden_size]`.
    pub attn_norm: Span,
    /// Fused Q, K and V with their biases, panels `[hidden_size x qkv_columns]`.
    pub qkv: Span,
    /// Output projection of attention, panels `[attention_width x hidden_size]`.
    pub attn_out: Span,
    /// RMSNorm weights before the MLP, vector `[hidden_size]`.
    pub mlp_norm: Span,
    /// Gate and up, panels that alternate (g0 u0 g1 u1 ...), `[hidden_size x intermediate_size]` each.
    pub gate_up: Span,
    /// Down projection, panels `[intermediate_size x hidden_size]`.
    pub down: Span,
}

/// Where every tensor of a Qwen2 model is in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qwen2Layout {
    /// Token embedding of untied models, panels `[hidden_size x vocab_size]`: token `t` is column `t`.
    pub embedding: Option<Span>,
    /// The first decoder layer.
    pub layer0: LayerLayout,
    /// Bytes from one layer to the next.
    pub layer_stride: u64,
    /// RMSNorm weights after the last layer, vector `[hidden_size]`.
    pub final_norm: Span,
    /// LM head, panels `[hidden_size x vocab_size]`; tied models read their embedding here too.
    pub lm_head: Span,
    /// Length of the arena in bytes, a multiple of 64.
    pub arena_bytes: u64,
}

/// Computes the arena layout of `cfg`, which must have passed [`Qwen2Config::validate`].
pub fn qwen2_weights_layout(cfg: &Qwen2Config) -> Qwen2Layout {
    let hidden = cfg.hidden_size as usize;
    let intermediate = cfg.intermediate_size as usize;
    let vocab = cfg.vocab_size as usize;
    let mut end = 0;
    let mut next = |bytes| {
        let span = Span { offset: end, bytes };
        end += bytes;
        span
    };
    let embedding = (!cfg.tie_word_embeddings).then(|| next(panels_bytes(hidden, vocab)));
    let layer0 = LayerLayout {
        attn_norm: next(vector_bytes(hidden)),
        qkv: next(panels_bytes(hidden, cfg.qkv_columns())),
        attn_out: next(panels_bytes(cfg.attention_width(), hidden)),
        mlp_norm: next(vector_bytes(hidden)),
        gate_up: next(2 * panels_bytes(hidden, intermediate)),
        down: next(panels_bytes(intermediate, hidden)),
    };
    let layer_stride = layer0.down.end() - layer0.attn_norm.offset;
    next(layer_stride * (u64::from(cfg.num_layers) - 1));
    let final_norm = next(vector_bytes(hidden));
    let lm_head = next(panels_bytes(hidden, vocab));
    Qwen2Layout { embedding, layer0, layer_stride, final_norm, lm_head, arena_bytes: end }
}

impl Qwen2Layout {
    /// Where the tensors of layer `i` are; `i` must be less than `num_layers`.
    pub const fn layer(&self, i: usize) -> LayerLayout {
        let by = i as u64 * self.layer_stride;
        LayerLayout {
            attn_norm: self.layer0.attn_norm.shifted(by),
            qkv: self.layer0.qkv.shifted(by),
            attn_out: self.layer0.attn_out.shifted(by),
            mlp_norm: self.layer0.mlp_norm.shifted(by),
            gate_up: self.layer0.gate_up.shifted(by),
            down: self.layer0.down.shifted(by),
        }
    }

    /// The tensors of the arena, in the order of their offsets.
    pub fn tensors(&self, cfg: &Qwen2Config) -> impl Iterator<Item = TensorEntry> + use<> {
        let layout = *self;
        let cfg = *cfg;
        let entry = move |layer, role, span| TensorEntry::new(&cfg, layer, role, span);
        let embedding = layout.embedding.map(|span| entry(None, TensorRole::Embedding, span));
        let layers = (0..cfg.num_layers).flat_map(move |i| {
            let at = layout.layer(i as usize);
            [
                entry(Some(i), TensorRole::AttnNorm, at.attn_norm),
                entry(Some(i), TensorRole::Qkv, at.qkv),
                entry(Some(i), TensorRole::AttnOut, at.attn_out),
                entry(Some(i), TensorRole::MlpNorm, at.mlp_norm),
                entry(Some(i), TensorRole::GateUp, at.gate_up),
                entry(Some(i), TensorRole::Down, at.down),
            ]
        });
        let last = [
            entry(None, TensorRole::FinalNorm, layout.final_norm),
            entry(None, TensorRole::LmHead, layout.lm_head),
        ];
        embedding.into_iter().chain(layers).chain(last)
    }
}

/// What a tensor of the arena is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// Token embedding of untied models.
    Embedding,
    /// RMSNorm weights before attention.
    AttnNorm,
    /// Fused Q, K and V.
    Qkv,
    /// Output projection of attention.
    AttnOut,
    /// RMSNorm weights before the MLP.
    MlpNorm,
    /// Gate and up, in alternating panels.
    GateUp,
    /// Down projection.
    Down,
    /// RMSNorm weights after the last layer.
    FinalNorm,
    /// LM head, and embedding of tied models.
    LmHead,
}

/// How the values of a tensor lie in the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TensorKind {
    /// `n` FP16 values, then zeros to a multiple of 32.
    Vector = 1,
    /// Panels of a matrix with `k` inputs and `n` outputs.
    Panels = 2,
    /// Panels of two matrices of `k` inputs and `n` outputs each, which alternate.
    PanelPairs = 3,
}

/// One tensor of the arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Decoder layer, or none for tensors outside the layers.
    pub layer: Option<u32>,
    /// What it is for.
    pub role: TensorRole,
    /// How its values lie in the arena.
    pub kind: TensorKind,
    /// Inputs of the matrix; 1 for vectors.
    pub k: u32,
    /// Outputs of the matrix (of each of the two for pairs), values of the vector.
    pub n: u32,
    /// Where it is in the arena.
    pub span: Span,
}

impl TensorEntry {
    fn new(cfg: &Qwen2Config, layer: Option<u32>, role: TensorRole, span: Span) -> TensorEntry {
        let hidden = cfg.hidden_size;
        let (kind, k, n) = match role {
            TensorRole::AttnNorm | TensorRole::MlpNorm | TensorRole::FinalNorm => {
                (TensorKind::Vector, 1, hidden)
            }
            TensorRole::Embedding | TensorRole::LmHead => (TensorKind::Panels, hidden, cfg.vocab_size),
            TensorRole::Qkv => (TensorKind::Panels, hidden, cfg.qkv_columns() as u32),
            TensorRole::AttnOut => (TensorKind::Panels, cfg.attention_width() as u32, hidden),
            TensorRole::GateUp => (TensorKind::PanelPairs, hidden, cfg.intermediate_size),
            TensorRole::Down => (TensorKind::Panels, cfg.intermediate_size, hidden),
        };
        TensorEntry { layer, role, kind, k, n, span }
    }

    /// The tensor's name, for example `lm_head` or `layers.3.qkv`; at most 64 ASCII bytes.
    pub fn name(&self) -> String {
        self.to_string()
    }
}

impl fmt::Display for TensorEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}.")?;
        }
        f.write_str(match self.role {
            TensorRole::Embedding => "embedding",
            TensorRole::AttnNorm => "attn_norm",
            TensorRole::Qkv => "qkv",
            TensorRole::AttnOut => "attn_out",
            TensorRole::MlpNorm => "mlp_norm",
            TensorRole::GateUp => "gate_up",
            TensorRole::Down => "down",
            TensorRole::FinalNorm => "final_norm",
            TensorRole::LmHead => "lm_head",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::{QWEN2_0_5B, QWEN2_72B, TINY};

    #[test]
    fn sizes() {
        assert_eq!(panel_bytes(2), 192);
        assert_eq!(panels_bytes(2, 1), 192);
        assert_eq!(panels_bytes(2, 32), 192);
        assert_eq!(panels_bytes(2, 33), 384);
        assert_eq!(vector_bytes(32), 64);
        assert_eq!(vector_bytes(33), 128);
    }

    #[test]
    fn qwen2_0_5b() {
        let layout = qwen2_weights_layout(&QWEN2_0_5B);
        assert_eq!(layout.embedding, None);
        let layer = layout.layer(0);
        assert_eq!(layer.attn_norm, Span { offset: 0, bytes: 1792 });
        assert_eq!(layer.qkv, Span { offset: 1792, bytes: 64 * 897 * 36 });
        assert_eq!(layer.attn_out, Span { offset: 1792 + 64 * 897 * 36, bytes: 64 * 897 * 28 });
        assert_eq!(layer.gate_up.bytes, 64 * 897 * 152 * 2);
        assert_eq!(layer.down.bytes, 64 * 4865 * 28);
        assert_eq!(layout.layer_stride, 2 * 1792 + 64 * (897 * (36 + 28 + 304) + 4865 * 28));
        assert_eq!(layout.layer(23).attn_norm.offset, 23 * layout.layer_stride);
        assert_eq!(layout.final_norm.offset, 24 * layout.layer_stride);
        assert_eq!(layout.lm_head.bytes, 64 * 897 * 151936 / 32);
        assert_eq!(layout.arena_bytes, layout.lm_head.end());
    }

    #[test]
    fn tensors_fill_the_arena_without_gaps() {
        for cfg in [QWEN2_0_5B, QWEN2_72B, TINY] {
            let layout = qwen2_weights_layout(&cfg);
            let mut end = 0;
            for tensor in layout.tensors(&cfg) {
                assert_eq!(tensor.span.offset, end, "{tensor}");
                let (k, n) = (tensor.k as usize, tensor.n as usize);
                assert_eq!(
                    tensor.span.bytes,
                    match tensor.kind {
                        TensorKind::Vector => vector_bytes(n),
                        TensorKind::Panels => panels_bytes(k, n),
                        TensorKind::PanelPairs => 2 * panels_bytes(k, n),
                    }
                );
                end = tensor.span.end();
            }
            assert_eq!(end, layout.arena_bytes);
        }
    }

    #[test]
    fn names() {
        let names: Vec<_> = qwen2_weights_layout(&TINY).tensors(&TINY).map(|tensor| tensor.name()).collect();
        assert_eq!(names[..4], ["embedding", "layers.0.attn_norm", "layers.0.qkv", "layers.0.attn_out"]);
        assert_eq!(names[11..], ["layers.1.gate_up", "layers.1.down", "final_norm", "lm_head"]);
    }

    #[test]
    fn the_largest_config_does_not_overflow() {
        let cfg = Qwen2Config {
            hidden_size: 1 << 16,
            intermediate_size: 1 << 20,
            num_layers: 1 << 10,
            num_heads: 1 << 10,
            num_kv_heads: 1 << 10,
            head_dim: 512,
            vocab_size: 1 << 24,
            max_position_embeddings: 1 << 27,
            tie_word_embeddings: false,
            ..QWEN2_0_5B
        };
        cfg.validate().unwrap();
        assert!(qwen2_weights_layout(&cfg).arena_bytes < 1 << 50);
    }
}
