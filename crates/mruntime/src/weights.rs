//! The weights: views into the weight arena.

use mrt_format::{Qwen2Config, Qwen2Layout, Span, qwen2_weights_layout};
use mrt_kernels::f16;

use crate::error::Error;

/// All weights of a model: the arena as FP16 numbers, and where each tensor is in it.
#[derive(Clone, Copy)]
pub struct Qwen2Weights<'a> {
    arena: &'a [f16],
    layout: Qwen2Layout,
    hidden: usize,
}

/// The weights of one decoder layer.
#[derive(Clone, Copy)]
pub struct LayerWeights<'a> {
    /// RMSNorm before attention, `[hidden]`.
    pub attn_norm: &'a [f16],
    /// Q, K and V with their biases, panels of hidden inputs.
    pub qkv: &'a [f16],
    /// Attention's output projection, panels of attention-width inputs.
    pub attn_out: &'a [f16],
    /// RMSNorm before the MLP, `[hidden]`.
    pub mlp_norm: &'a [f16],
    /// Gate and up in alternating panels of hidden inputs.
    pub gate_up: &'a [f16],
    /// Down projection, panels of intermediate-size inputs.
    pub down: &'a [f16],
}

impl<'a> Qwen2Weights<'a> {
    /// The weights in `arena`, which [`qwen2_weights_layout`] describes.
    ///
    /// # Errors
    /// When the arena has another length than the layout, or does not begin at a multiple of 64 bytes.
    pub fn from_arena(cfg: &Qwen2Config, arena: &'a [u8]) -> Result<Self, Error> {
        let layout = qwen2_weights_layout(cfg);
        let (bytes, address) = (arena.len() as u64, arena.as_ptr().addr());
        if bytes != layout.arena_bytes || !address.is_multiple_of(64) {
            return Err(Error::WeightArena { expected: layout.arena_bytes, bytes, address });
        }
        Ok(Qwen2Weights { arena: bytemuck::cast_slice(arena), layout, hidden: cfg.hidden_size as usize })
    }

    fn span(&self, span: Span) -> &'a [f16] {
        &self.arena[span.offset as usize / 2..][..span.bytes as usize / 2]
    }

    /// A vector of `hidden` elements, without its padding.
    fn vector(&self, span: Span) -> &'a [f16] {
        &self.span(span)[..self.hidden]
    }

    /// Panels of hidden inputs whose columns are the embeddings of the tokens.
    pub fn embedding(&self) -> &'a [f16] {
        self.span(self.layout.embedding.unwrap_or(self.layout.lm_head))
    }

    /// Layer `i`.
    pub fn layer(&self, i: usize) -> LayerWeights<'a> {
        let at = self.layout.layer(i);
        LayerWeights {
            attn_norm: self.vector(at.attn_norm),
            qkv: self.span(at.qkv),
            attn_out: self.span(at.attn_out),
            mlp_norm: self.vector(at.mlp_norm),
            gate_up: self.span(at.gate_up),
            down: self.span(at.down),
        }
    }

    /// RMSNorm after the last layer, `[hidden]`.
    pub fn final_norm(&self) -> &'a [f16] {
        self.vector(self.layout.final_norm)
    }

    /// The LM head, panels of hidden inputs.
    pub fn lm_head(&self) -> &'a [f16] {
        self.span(self.layout.lm_head)
    }
}
