//! The KV cache: FP16 panels, so that attention runs on the same products as the weights do.
//!
//! For each layer and KV head, the keys are panels of 32 positions over head_dim inputs, and the values are panels of
//! 32 dimensions over as many positions as the context has. The bias rows are there and not used.

use mrt_format::Qwen2Config;
use mrt_kernels::f16;
use mrt_kernels::{PANEL, panel_count, panel_len};

use crate::arena::{Bump, aligned_bytes};
use crate::error::Error;

/// Keys and values of the positions processed so far, for all layers.
pub struct KvCache<'a> {
    k: &'a mut [f16],
    v: &'a mut [f16],
    shape: KvShape,
    len: usize,
}

/// Sizes of a KV cache, in FP16 elements and positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Positions that there is room for: the context size.
    pub context: usize,
    /// KV heads of a layer.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    layers: usize,
}

impl KvShape {
    pub(crate) fn new(cfg: &Qwen2Config, context: usize) -> KvShape {
        let (heads, head_dim) = (cfg.num_kv_heads as usize, cfg.head_dim as usize);
        KvShape { context, heads, head_dim, layers: cfg.num_layers as usize }
    }

    /// Elements of the K panels of one head.
    pub fn k_head_len(&self) -> usize {
        panel_count(self.context).saturating_mul(panel_len(self.head_dim))
    }

    /// Elements of one V panel: its bias row and a row for each position.
    pub fn v_panel_len(&self) -> usize {
        panel_len(self.context)
    }

    /// Elements of the V panels of one head.
    pub fn v_head_len(&self) -> usize {
        panel_count(self.head_dim).saturating_mul(self.v_panel_len())
    }
}

/// Bytes of the KV arena for a context of `context` positions.
pub(crate) fn kv_cache_bytes(cfg: &Qwen2Config, context: usize) -> u64 {
    let shape = KvShape::new(cfg, context);
    let heads = shape.layers * shape.heads;
    aligned_bytes::<f16>(heads.saturating_mul(shape.k_head_len()))
        .saturating_add(aligned_bytes::<f16>(heads.saturating_mul(shape.v_head_len())))
}

/// Whether a KV cache can be that long.
///
/// # Errors
/// When the context is 0, or longer than the model was trained for.
pub(crate) fn check_context(cfg: &Qwen2Config, context: usize) -> Result<(), Error> {
    let trained = cfg.max_position_embeddings as usize;
    if (1..=trained).contains(&context) {
        return Ok(());
    }
    Err(Error::Context { context, bytes: kv_cache_bytes(cfg, context), trained })
}

/// Cuts an empty KV cache for `context` positions out of a zeroed arena.
///
/// # Errors
/// When `context` is 0 or longer than the model was trained for, or the arena has fewer bytes left than
/// [`qwen2_memory_sizes`](crate::qwen2_memory_sizes) says.
pub fn qwen2_init_kv_cache<'a>(
    cfg: &Qwen2Config,
    context: usize,
    arena: &mut Bump<'a>,
) -> Result<KvCache<'a>, Error> {
    check_context(cfg, context)?;
    let shape = KvShape::new(cfg, context);
    let heads = shape.layers * shape.heads;
    let k = arena.alloc(heads.saturating_mul(shape.k_head_len()))?;
    let v = arena.alloc(heads.saturating_mul(shape.v_head_len()))?;
    Ok(KvCache { k, v, shape, len: 0 })
}

impl KvCache<'_> {
    /// Positions that are filled.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no position is filled.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that there is room for.
    pub fn context(&self) -> usize {
        self.shape.context
    }

    /// Forgets all positions from `len` on.
    ///
    /// # Panics
    /// If fewer are filled.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "a cache of {} positions cut to {len}", self.len);
        self.len = len;
    }

    /// Takes over all positions of `other`, a cache of the same model.
    ///
    /// # Panics
    /// If there is no room for them, or `other` is of another model.
    pub(crate) fn copy_from(&mut self, other: &KvCache<'_>) {
        let len = other.len;
        assert!(len <= self.context(), "{len} positions in a context of {}", self.context());
        assert_eq!(KvShape { context: 0, ..self.shape }, KvShape { context: 0, ..other.shape });
        let (k, v) = self.pieces_mut(len);
        let (other_k, other_v) = other.pieces();
        k.zip(other_k).chain(v.zip(other_v)).for_each(|(to, from)| to.copy_from_slice(from));
        self.len = len;
    }

    /// The filled positions, without the rows of biases: all K panels that hold some, `[head_dim][32 positions]` each,
    /// whose last may have lanes that are not filled; then of all V panels what is filled, `[positions][32 dims]`.
    /// Layers, heads and panels are in ascending order.
    pub(crate) fn pieces(&self) -> (impl Iterator<Item = &[f16]>, impl Iterator<Item = &[f16]>) {
        let (len, panel) = (self.len, panel_len(self.shape.head_dim));
        let k = self.k.chunks_exact(self.shape.k_head_len());
        let k = k.flat_map(move |head| head.chunks_exact(panel).take(panel_count(len)));
        let v = self.v.chunks_exact(self.shape.v_panel_len());
        (k.map(|panel| &panel[PANEL..]), v.map(move |panel| &panel[PANEL * V_BIAS_ROWS..][..PANEL * len]))
    }

    /// [`pieces`](Self::pieces) as they are when `len` positions are filled.
    pub(crate) fn pieces_mut(
        &mut self,
        len: usize,
    ) -> (impl Iterator<Item = &mut [f16]>, impl Iterator<Item = &mut [f16]>) {
        let panel = panel_len(self.shape.head_dim);
        let k = self.k.chunks_exact_mut(self.shape.k_head_len());
        let k = k.flat_map(move |head| head.chunks_exact_mut(panel).take(panel_count(len)));
        let v = self.v.chunks_exact_mut(self.shape.v_panel_len());
        (
            k.map(|panel| &mut panel[PANEL..]),
            v.map(move |panel| &mut panel[PANEL * V_BIAS_ROWS..][..PANEL * len]),
        )
    }

    /// Bytes of the [`pieces`](Self::pieces) when `len` positions are filled.
    pub(crate) fn pieces_bytes(&self, len: usize) -> u64 {
        let KvShape { heads, head_dim, layers, .. } = self.shape;
        let rows = panel_count(len) * head_dim + panel_count(head_dim) * len;
        (layers * heads * rows * PANEL * size_of::<f16>()) as u64
    }

    /// Counts `positions` more as filled.
    pub(crate) fn advance(&mut self, positions: usize) {
        self.len += positions;
    }

    pub(crate) fn shape(&self) -> KvShape {
        self.shape
    }

    /// The K and V panels of one layer: `heads` times [`KvShape::k_head_len`] and [`KvShape::v_head_len`] elements.
    pub(crate) fn layer_mut(&mut self, i: usize) -> (&mut [f16], &mut [f16]) {
        let (k, v) = (self.shape.heads * self.shape.k_head_len(), self.shape.heads * self.shape.v_head_len());
        (&mut self.k[i * k..][..k], &mut self.v[i * v..][..v])
    }
}

/// Rows of a V panel before the first position: the bias row.
pub(crate) const V_BIAS_ROWS: usize = 1;

/// The 32 (or fewer) values of position `t` in V panel `j` of a head.
pub(crate) fn v_row<'a>(shape: &KvShape, v_head: &'a mut [f16], j: usize, t: usize) -> &'a mut [f16] {
    let columns = PANEL.min(shape.head_dim - j * PANEL);
    &mut v_head[j * shape.v_panel_len() + (t + V_BIAS_ROWS) * PANEL..][..columns]
}
