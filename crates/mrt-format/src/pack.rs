//! Packing source tensors into the arena: the one code that the converter and the loader share.

use std::io;
use std::ops::AddAssign;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::config::Qwen2Config;
use crate::layout::{PANEL, Qwen2Layout, ROW_BYTES, TensorEntry, TensorKind};
use crate::source::{Segment, qwen2_source_count, qwen2_source_tensors, segments};

/// Element type of a source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum SourceDtype {
    /// bfloat16.
    Bf16 = 1,
    /// IEEE binary16.
    F16 = 2,
    /// IEEE binary32.
    F32 = 3,
}

impl SourceDtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            SourceDtype::Bf16 | SourceDtype::F16 => 2,
            SourceDtype::F32 => 4,
        }
    }
}

/// Where the source tensors come from. `index` counts in the order of [`qwen2_source_tensors`], and the
/// implementation vouches that the tensors have the shapes given there.
pub trait TensorSource: Sync {
    /// Element type of tensor `index`.
    fn dtype(&self, index: usize) -> SourceDtype;

    /// Fills `buf` with the little-endian bytes of tensor `index` that start at `byte_offset`.
    ///
    /// # Errors
    /// Whatever reading meets; packing stops and reports it with the tensor's name.
    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What became of the elements of a source tensor in FP16. The three are disjoint and sum to the elements
/// packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kept without change.
    pub exact: u64,
    /// Rounded to another value that is not zero.
    pub rounded: u64,
    /// Not zero before, zero after.
    pub flushed: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.exact += other.exact;
        self.rounded += other.rounded;
        self.flushed += other.flushed;
    }
}

/// Why packing stopped. The bytes written until then are of no use.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The source failed to deliver a tensor's bytes.
    #[error("reading tensor {tensor}: {error}")]
    Read {
        /// Name in the checkpoint.
        tensor: String,
        /// What the source said.
        #[source]
        error: io::Error,
    },
    /// A finite value whose nearest FP16 value is infinity.
    #[error("{tensor}{index:?} is {value}, beyond FP16's largest value 65504")]
    Overflow {
        /// Name in the checkpoint.
        tensor: String,
        /// `[row, column]` of a matrix, `[element]` of a vector.
        index: Vec<u64>,
        /// The value.
        value: f32,
    },
    /// An infinity or NaN.
    #[error("{tensor}{index:?} is {value}; a weight must be a finite number")]
    NonFinite {
        /// Name in the checkpoint.
        tensor: String,
        /// `[row, column]` of a matrix, `[element]` of a vector.
        index: Vec<u64>,
        /// The value.
        value: f32,
    },
}

/// Source bytes held at a time: 32 rows of up to 8192 two-byte or 4096 four-byte elements, within most L2
/// caches.
const BLOCK_BYTES: usize = 512 << 10;

/// Elements of one row converted at a time, so that a tile of 32 rows stays in the L1 cache.
const TILE: usize = 256;

/// Working memory of one packing thread: 528 KiB, whatever the model's size.
pub struct PackScratch {
    block: Vec<u8>,
    tile: Vec<[f16; TILE]>,
}

impl PackScratch {
    /// Allocates the working memory.
    pub fn new() -> PackScratch {
        PackScratch { block: vec![0; BLOCK_BYTES], tile: vec![[f16::ZERO; TILE]; PANEL] }
    }
}

impl Default for PackScratch {
    fn default() -> PackScratch {
        PackScratch::new()
    }
}

/// Fills `out` with the arena bytes `[offset, offset + out.len())`.
///
/// Every byte of `out` is written; what it held before does not matter. Any partition of the arena into
/// ranges gives the same bytes, and adds each source element once to `counts`, which has one entry per source
/// tensor. Values round to nearest even, subnormals are kept, and so is the sign of zero.
///
/// # Errors
/// A source that cannot be read, or a value that FP16 cannot hold.
///
/// # Panics
/// If the range is not within the arena, if `offset` or `out.len()` is not a multiple of 64, or if `counts`
/// has another length.
pub fn pack_arena_range(
    cfg: &Qwen2Config,
    layout: &Qwen2Layout,
    source: &impl TensorSource,
    offset: u64,
    out: &mut [u8],
    counts: &mut [Counts],
    scratch: &mut PackScratch,
) -> Result<(), PackError> {
    let end = offset + out.len() as u64;
    assert!(
        end <= layout.arena_bytes,
        "range {offset}..{end} is outside an arena of {} bytes",
        layout.arena_bytes
    );
    assert!(offset.is_multiple_of(ROW_BYTES as u64), "offset {offset} is not a multiple of {ROW_BYTES}");
    assert_eq!(counts.len(), qwen2_source_count(cfg), "one count per source tensor");
    let (out, rest) = out.as_chunks_mut::<ROW_BYTES>();
    assert!(rest.is_empty(), "the range's length is not a multiple of {ROW_BYTES}");

    let mut packer = Packer { cfg, source, counts, scratch };
    for tensor in layout.tensors(cfg) {
        let start = tensor.span.offset.max(offset);
        let stop = tensor.span.end().min(end);
        if start < stop {
            let row = |at: u64| ((at - offset) / ROW_BYTES as u64) as usize;
            let rows = &mut out[row(start)..row(stop)];
            let first = (start - tensor.span.offset) / ROW_BYTES as u64;
            match tensor.kind {
                TensorKind::Vector => packer.vector(&tensor, first, rows)?,
                TensorKind::Panels | TensorKind::PanelPairs => packer.panels(&tensor, first, rows)?,
            }
        }
    }
    Ok(())
}

/// One 64-byte row of the arena: 32 little-endian FP16 values.
type Row = [u8; ROW_BYTES];

/// Neighbouring lanes of one panel that come from consecutive rows of one source matrix.
#[derive(Clone, Copy)]
struct Lanes {
    segment: Segment,
    first_row: usize,
    first_lane: usize,
    count: usize,
}

/// The lanes of panel `panel`, in order; lanes after the last are spare.
fn panel_lanes(cfg: &Qwen2Config, tensor: &TensorEntry, panel: usize) -> impl Iterator<Item = Lanes> + Clone {
    // A panel of a pair holds columns of one of the two segments, any other the columns of all segments in a row.
    let (first_column, only) = match tensor.kind {
        TensorKind::PanelPairs => (panel / 2 * PANEL, Some(panel % 2)),
        TensorKind::Panels | TensorKind::Vector => (panel * PANEL, None),
    };
    let mut end = 0;
    segments(cfg, tensor).enumerate().filter(move |(i, _)| only.is_none_or(|only| only == *i)).filter_map(
        move |(_, segment)| {
            let start = end;
            end += segment.columns;
            let from = start.max(first_column);
            let to = end.min(first_column + PANEL);
            (from < to).then(|| Lanes {
                segment,
                first_row: from - start,
                first_lane: from - first_column,
                count: to - from,
            })
        },
    )
}

struct Packer<'a, S> {
    cfg: &'a Qwen2Config,
    source: &'a S,
    counts: &'a mut [Counts],
    scratch: &'a mut PackScratch,
}

impl<S: TensorSource> Packer<'_, S> {
    /// Rows `first..` of a vector.
    fn vector(&mut self, tensor: &TensorEntry, first: u64, rows: &mut [Row]) -> Result<(), PackError> {
        for segment in segments(self.cfg, tensor) {
            for (i, row) in rows.iter_mut().enumerate() {
                let element = (first as usize + i) * PANEL;
                let mut values = [f16::ZERO; PANEL];
                self.elements(segment.weight, element, &mut values[..PANEL.min(segment.columns - element)])?;
                *row = to_row(&values);
            }
        }
        Ok(())
    }

    /// Rows `first..` of a tensor of panels.
    fn panels(&mut self, tensor: &TensorEntry, first: u64, mut rows: &mut [Row]) -> Result<(), PackError> {
        let k = tensor.k as usize;
        let mut at = first;
        while !rows.is_empty() {
            let panel_rows = k as u64 + 1;
            let (panel, row) = ((at / panel_rows) as usize, (at % panel_rows) as usize);
            let (mut these, others) = rows.split_at_mut((k + 1 - row).min(rows.len()));
            rows = others;
            at += these.len() as u64;

            let lanes = panel_lanes(self.cfg, tensor, panel);
            if row == 0 {
                let (biases, weights) = these.split_first_mut().expect("the range is not empty");
                *biases = self.biases(lanes.clone())?;
                these = weights;
            }
            self.weights(lanes, k, row.saturating_sub(1), these)?;
        }
        Ok(())
    }

    fn biases(&mut self, lanes: impl Iterator<Item = Lanes>) -> Result<Row, PackError> {
        let mut values = [f16::ZERO; PANEL];
        for run in lanes {
            if let Some(bias) = run.segment.bias {
                self.elements(bias, run.first_row, &mut values[run.first_lane..][..run.count])?;
            }
        }
        Ok(to_row(&values))
    }

    /// Reads and converts up to 32 consecutive elements of a one-dimensional source tensor.
    fn elements(&mut self, index: usize, first: usize, values: &mut [f16]) -> Result<(), PackError> {
        let dtype = self.source.dtype(index);
        let bytes = &mut self.scratch.block[..values.len() * dtype.bytes()];
        read(self.cfg, self.source, index, dtype, first as u64, bytes)?;
        self.counts[index] +=
            convert(dtype, bytes, values).map_err(|bad| bad.at(self.cfg, index, &[first + bad.element]))?;
        Ok(())
    }

    /// Rows `first_k..` of the weights of one panel with `k` inputs.
    fn weights(
        &mut self,
        lanes: impl Iterator<Item = Lanes> + Clone,
        k: usize,
        first_k: usize,
        rows: &mut [Row],
    ) -> Result<(), PackError> {
        let used = lanes.clone().map(|run| run.count).sum();
        self.scratch.tile[used..].fill([f16::ZERO; TILE]);
        let widest =
            lanes.clone().map(|run| self.source.dtype(run.segment.weight).bytes()).max().unwrap_or(1);
        let block_columns = BLOCK_BYTES / (PANEL * widest);
        for (i, rows) in rows.chunks_mut(block_columns).enumerate() {
            let block = Block { k, first: first_k + i * block_columns, columns: rows.len(), widest };
            for run in lanes.clone() {
                self.read_block(&block, &run)?;
            }
            for (j, rows) in rows.chunks_mut(TILE).enumerate() {
                for run in lanes.clone() {
                    self.convert_tile(&block, &run, j * TILE, rows.len())?;
                }
                transpose(&self.scratch.tile, rows);
            }
        }
        Ok(())
    }

    /// Reads the columns of a block from the source rows of `run`.
    fn read_block(&mut self, block: &Block, run: &Lanes) -> Result<(), PackError> {
        let index = run.segment.weight;
        let dtype = self.source.dtype(index);
        let first = run.first_row as u64 * block.k as u64 + block.first as u64;
        let bytes = &mut self.scratch.block[block.lane(run.first_lane)..];
        let row_bytes = block.columns * dtype.bytes();
        if block.columns == block.k {
            // Whole rows follow one another in the source as they do here.
            return read(self.cfg, self.source, index, dtype, first, &mut bytes[..run.count * row_bytes]);
        }
        for (i, row) in bytes.chunks_exact_mut(row_bytes).take(run.count).enumerate() {
            read(self.cfg, self.source, index, dtype, first + i as u64 * block.k as u64, row)?;
        }
        Ok(())
    }

    /// Converts the columns `[first, first + columns)` of a block's lanes of `run` into the tile.
    fn convert_tile(
        &mut self,
        block: &Block,
        run: &Lanes,
        first: usize,
        columns: usize,
    ) -> Result<(), PackError> {
        let index = run.segment.weight;
        let dtype = self.source.dtype(index);
        let PackScratch { block: bytes, tile } = &mut *self.scratch;
        let rows = bytes[block.lane(run.first_lane)..].chunks_exact(block.columns * dtype.bytes());
        let mut counts = Counts::default();
        for (i, (row, lane)) in rows.zip(&mut tile[run.first_lane..][..run.count]).enumerate() {
            let elements = &row[first * dtype.bytes()..][..columns * dtype.bytes()];
            counts += convert(dtype, elements, &mut lane[..columns]).map_err(|bad| {
                bad.at(self.cfg, index, &[run.first_row + i, block.first + first + bad.element])
            })?;
        }
        self.counts[index] += counts;
        Ok(())
    }
}

/// Some columns of the 32 source rows of a panel.
struct Block {
    /// Columns of the source matrices.
    k: usize,
    /// First column.
    first: usize,
    /// Number of columns.
    columns: usize,
    /// Bytes of an element of the widest source.
    widest: usize,
}

impl Block {
    /// Where the bytes of a lane may start, when every earlier lane has the widest elements.
    fn lane(&self, lane: usize) -> usize {
        lane * self.columns * self.widest
    }
}

fn read(
    cfg: &Qwen2Config,
    source: &impl TensorSource,
    index: usize,
    dtype: SourceDtype,
    first: u64,
    bytes: &mut [u8],
) -> Result<(), PackError> {
    source
        .read(index, first * dtype.bytes() as u64, bytes)
        .map_err(|error| PackError::Read { tensor: qwen2_source_tensors(cfg)[index].name.clone(), error })
}

fn to_row(values: &[f16; PANEL]) -> Row {
    let mut row = [0; ROW_BYTES];
    for (bytes, value) in row.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    row
}

/// Writes the columns of the tile's lanes as rows of a panel.
fn transpose(tile: &[[f16; TILE]], rows: &mut [Row]) {
    let tile: &[[f16; TILE]; PANEL] = tile.try_into().expect("one row per lane");
    for (i, row) in rows.iter_mut().enumerate() {
        for (bytes, lane) in row.as_chunks_mut::<2>().0.iter_mut().zip(tile) {
            *bytes = lane[i].to_le_bytes();
        }
    }
}

/// An element that FP16 cannot hold.
#[derive(Clone, Copy)]
struct BadElement {
    element: usize,
    value: f32,
}

impl BadElement {
    fn at(self, cfg: &Qwen2Config, index: usize, place: &[usize]) -> PackError {
        let tensor = qwen2_source_tensors(cfg)[index].name.clone();
        let index = place.iter().map(|&i| i as u64).collect();
        let value = self.value;
        if value.is_finite() {
            PackError::Overflow { tensor, index, value }
        } else {
            PackError::NonFinite { tensor, index, value }
        }
    }
}

/// Converts up to [`TILE`] little-endian source elements.
///
/// The loops have no early exit, so that they become vector code.
fn convert(dtype: SourceDtype, bytes: &[u8], values: &mut [f16]) -> Result<Counts, BadElement> {
    let mut wide = [0f32; TILE];
    let wide = &mut wide[..values.len()];
    match dtype {
        SourceDtype::F16 => {
            for (value, &bytes) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f16::from_le_bytes(bytes);
            }
            return match first_not_finite(values) {
                Some(element) => Err(BadElement { element, value: values[element].to_f32() }),
                None => Ok(Counts { exact: values.len() as u64, ..Counts::default() }),
            };
        }
        SourceDtype::Bf16 => {
            for (wide, &bytes) in wide.iter_mut().zip(bytes.as_chunks().0) {
                *wide = f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16);
            }
        }
        SourceDtype::F32 => {
            for (wide, &bytes) in wide.iter_mut().zip(bytes.as_chunks().0) {
                *wide = f32::from_le_bytes(bytes);
            }
        }
    }
    values.convert_from_f32_slice(wide);
    // An infinity or NaN here is one in the source, or an overflow.
    if let Some(element) = first_not_finite(values) {
        return Err(BadElement { element, value: wide[element] });
    }
    Ok(count(wide, values))
}

/// The first infinity or NaN.
fn first_not_finite(values: &[f16]) -> Option<usize> {
    let not_finite = |value: &f16| value.to_bits() & 0x7c00 == 0x7c00;
    let any = values.iter().fold(false, |any, value| any | not_finite(value));
    if any { values.iter().position(not_finite) } else { None }
}

/// Compares source values with their FP16 values, which are finite.
fn count(wide: &[f32], values: &[f16]) -> Counts {
    // FP16 holds every BF16 value from 2^-17 on, and most weights are such: then there is nothing to compare.
    let certain = |value: &f32| {
        let magnitude = value.to_bits() & 0x7fff_ffff;
        (value.to_bits() & 0xffff == 0) & ((magnitude == 0) | (magnitude >= (127 - 17) << 23))
    };
    if wide.iter().fold(true, |all, value| all & certain(value)) {
        return Counts { exact: wide.len() as u64, ..Counts::default() };
    }
    let mut back = [0f32; TILE];
    let back = &mut back[..wide.len()];
    values.convert_to_f32_slice(back);
    let (mut exact, mut flushed) = (0u32, 0u32);
    for (wide, back) in wide.iter().zip(&*back) {
        exact += u32::from(wide == back);
        flushed += u32::from((*wide != 0.0) & (*back == 0.0));
    }
    let rounded = wide.len() as u64 - u64::from(exact) - u64::from(flushed);
    Counts { exact: exact.into(), rounded, flushed: flushed.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::qwen2_weights_layout;
    use crate::test_model::TINY;

    /// A source in memory.
    struct Memory(Vec<(SourceDtype, Vec<u8>)>);

    impl TensorSource for Memory {
        fn dtype(&self, index: usize) -> SourceDtype {
            self.0[index].0
        }

        fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
            let bytes = self.0[index].1.get(byte_offset as usize..).and_then(|bytes| bytes.get(..buf.len()));
            buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    impl Memory {
        /// Pseudo-random finite values from far below FP16's subnormals to 2^15, `dtypes` in turn.
        fn random(cfg: &Qwen2Config, dtypes: &[SourceDtype]) -> Memory {
            let mut state = 1u64;
            let mut next = || {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                state ^ state >> 29
            };
            let tensors =
                qwen2_source_tensors(cfg).into_iter().zip(dtypes.iter().cycle()).map(|(tensor, &dtype)| {
                    let values = (0..tensor.elements()).map(|_| {
                        let bits = next() >> 16;
                        let exponent = if dtype == SourceDtype::F16 { 113 } else { 95 } + (bits >> 32) % 29;
                        f32::from_bits(bits as u32 & 0x807f_ffff | (exponent as u32) << 23)
                    });
                    let bytes = match dtype {
                        SourceDtype::Bf16 => {
                            values.flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
                        }
                        SourceDtype::F16 => values.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
                        SourceDtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
                    };
                    (dtype, bytes)
                });
            Memory(tensors.collect())
        }

        fn value(&self, index: usize, element: usize) -> f32 {
            let (dtype, bytes) = &self.0[index];
            let at = &bytes[element * dtype.bytes()..][..dtype.bytes()];
            match dtype {
                SourceDtype::Bf16 => {
                    f32::from_bits(u32::from(u16::from_le_bytes(at.try_into().unwrap())) << 16)
                }
                SourceDtype::F16 => f16::from_le_bytes(at.try_into().unwrap()).to_f32(),
                SourceDtype::F32 => f32::from_le_bytes(at.try_into().unwrap()),
            }
        }

        fn set(&mut self, index: usize, element: usize, value: f32) {
            let (dtype, bytes) = &mut self.0[index];
            let new = match dtype {
                SourceDtype::Bf16 => ((value.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
                SourceDtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                SourceDtype::F32 => value.to_le_bytes().to_vec(),
            };
            bytes[element * dtype.bytes()..][..dtype.bytes()].copy_from_slice(&new);
        }
    }

    /// Nearest FP16 value, ties to even, by integer arithmetic alone; none if that is not finite.
    fn reference_f16(value: f32) -> Option<u16> {
        let sign = (value.to_bits() >> 16) as u16 & 0x8000;
        let magnitude = value.abs();
        // 65520 is the middle between the largest FP16 value and what would follow it.
        if !magnitude.is_finite() || magnitude >= 65520.0 {
            return None;
        }
        let bits = magnitude.to_bits();
        let (exponent, mantissa) = (bits >> 23, u64::from(bits & 0x7f_ffff));
        let mantissa = if exponent == 0 { mantissa } else { mantissa | 1 << 23 };
        // value = mantissa * 2^(exponent - 150); a unit of the FP16 result is 2^(max(exponent - 137, -24)).
        let unit = (exponent as i32 - 137).max(-24);
        let shift = unit - (exponent.max(1) as i32 - 150);
        let rounded = if shift > 40 {
            0
        } else {
            let (whole, rest, half) = (mantissa >> shift, mantissa & ((1 << shift) - 1), 1 << (shift - 1));
            whole + u64::from(rest > half || rest == half && whole & 1 == 1)
        };
        // Adding the mantissa with its leading bit to the exponent field below carries as it must.
        let field = ((unit + 24) as u64) << 10;
        Some(sign | (field + rounded) as u16)
    }

    /// The element (source tensor, index) at each FP16 place of the arena, none for padding. Written from the
    /// description of the layout, one output column at a time, and sharing nothing with the packing code.
    fn reference_places(cfg: &Qwen2Config) -> Vec<Option<(usize, usize)>> {
        type Column = Option<(usize, usize)>;
        let sources = qwen2_source_tensors(cfg);
        let index = |name: &str| sources.iter().position(|tensor| tensor.name == name);
        let column = |tensor: &str, row: usize| index(&format!("{tensor}.weight")).map(|index| (index, row));
        let columns = |tensor: &str, n: usize| (0..n).map(|row| column(tensor, row)).collect::<Vec<_>>();
        let panels = |columns: &[Column], k: usize| {
            let mut places = Vec::new();
            for panel in columns.chunks(32) {
                let lanes: Vec<Column> = (0..32).map(|lane| panel.get(lane).copied().flatten()).collect();
                places.extend(lanes.iter().map(|lane| {
                    let (weight, row) = (*lane)?;
                    let bias = index(&sources[weight].name.replace("weight", "bias"))?;
                    (bias != weight).then_some((bias, row))
                }));
                for i in 0..k {
                    places.extend(lanes.iter().map(|lane| lane.map(|(weight, row)| (weight, row * k + i))));
                }
            }
            places
        };
        let hidden = cfg.hidden_size as usize;
        let intermediate = cfg.intermediate_size as usize;
        let vocab = cfg.vocab_size as usize;
        let vector = |tensor: &str| {
            let mut places = columns(tensor, hidden);
            places.resize(hidden.next_multiple_of(32), None);
            places
        };
        let mut arena = Vec::new();
        if !cfg.tie_word_embeddings {
            arena.extend(panels(&columns("model.embed_tokens", vocab), hidden));
        }
        for i in 0..cfg.num_layers {
            let name = |name: &str| format!("model.layers.{i}.{name}");
            let qkv = [
                columns(&name("self_attn.q_proj"), cfg.attention_width()),
                columns(&name("self_attn.k_proj"), cfg.kv_width()),
                columns(&name("self_attn.v_proj"), cfg.kv_width()),
            ];
            let gate_up = (0..intermediate).step_by(32).flat_map(|first| {
                let half = |tensor: &str| {
                    let tensor = name(tensor);
                    (first..first + 32)
                        .map(move |row| (row < intermediate).then(|| column(&tensor, row)).flatten())
                };
                half("mlp.gate_proj").chain(half("mlp.up_proj")).collect::<Vec<_>>()
            });
            arena.extend(vector(&name("input_layernorm")));
            arena.extend(panels(&qkv.concat(), hidden));
            arena.extend(panels(&columns(&name("self_attn.o_proj"), hidden), cfg.attention_width()));
            arena.extend(vector(&name("post_attention_layernorm")));
            arena.extend(panels(&gate_up.collect::<Vec<_>>(), hidden));
            arena.extend(panels(&columns(&name("mlp.down_proj"), hidden), intermediate));
        }
        arena.extend(vector("model.norm"));
        let head = if cfg.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        arena.extend(panels(&columns(head, vocab), hidden));
        arena
    }

    /// Arena and counts, element by element.
    fn reference(cfg: &Qwen2Config, source: &Memory) -> (Vec<u8>, Vec<Counts>) {
        let mut counts = vec![Counts::default(); qwen2_source_count(cfg)];
        let places = reference_places(cfg).into_iter();
        let arena = places.flat_map(|place| {
            let Some((index, element)) = place else { return [0, 0] };
            let value = source.value(index, element);
            let bits = reference_f16(value).unwrap();
            if f16::from_bits(bits).to_f64() == f64::from(value) {
                counts[index].exact += 1;
            } else if bits & 0x7fff == 0 {
                counts[index].flushed += 1;
            } else {
                counts[index].rounded += 1;
            }
            bits.to_le_bytes()
        });
        (arena.collect(), counts)
    }

    /// Packs the whole arena in ranges of `step` bytes.
    fn pack(cfg: &Qwen2Config, source: &Memory, step: usize) -> Result<(Vec<u8>, Vec<Counts>), PackError> {
        let layout = qwen2_weights_layout(cfg);
        let mut arena = vec![0xaa; layout.arena_bytes as usize];
        let mut counts = vec![Counts::default(); qwen2_source_count(cfg)];
        let mut scratch = PackScratch::new();
        for (i, out) in arena.chunks_mut(step).enumerate() {
            pack_arena_range(cfg, &layout, source, (i * step) as u64, out, &mut counts, &mut scratch)?;
        }
        Ok((arena, counts))
    }

    /// Configs that cross every boundary: of lanes, of tiles (256 inputs) and of blocks (4096 or 8192
    /// inputs).
    fn configs() -> [Qwen2Config; 4] {
        let tied = Qwen2Config { tie_word_embeddings: true, num_kv_heads: 6, vocab_size: 96, ..TINY };
        let wide =
            Qwen2Config { hidden_size: 300, num_layers: 1, head_dim: 50, intermediate_size: 33, ..TINY };
        let deep = Qwen2Config { hidden_size: 33, num_layers: 1, intermediate_size: 8200, ..TINY };
        [TINY, tied, wide, deep]
    }

    const DTYPES: [&[SourceDtype]; 4] = [
        &[SourceDtype::Bf16],
        &[SourceDtype::F16],
        &[SourceDtype::F32],
        &[SourceDtype::F32, SourceDtype::Bf16, SourceDtype::F16, SourceDtype::Bf16, SourceDtype::F32],
    ];

    #[test]
    fn equals_the_reference_however_it_is_split() {
        for cfg in configs() {
            for dtypes in DTYPES {
                let source = Memory::random(&cfg, dtypes);
                let expected = reference(&cfg, &source);
                for step in [1 << 30, 64 * 1001, 64 * 37, 64] {
                    assert_eq!(pack(&cfg, &source, step).unwrap(), expected, "{cfg:?} {dtypes:?} {step}");
                }
            }
        }
    }

    #[test]
    fn every_source_element_is_counted_once() {
        let source = Memory::random(&TINY, DTYPES[3]);
        let (_, counts) = pack(&TINY, &source, 64 * 3).unwrap();
        for (tensor, count) in qwen2_source_tensors(&TINY).iter().zip(&counts) {
            assert_eq!(count.exact + count.rounded + count.flushed, tensor.elements(), "{}", tensor.name);
        }
        let total = counts.iter().fold(Counts::default(), |mut total, &count| {
            total += count;
            total
        });
        assert!(total.exact > 0 && total.rounded > 0 && total.flushed > 0);
    }

    #[test]
    fn every_bf16_value_and_the_edges_of_f32() {
        for bits in 0..=u16::MAX {
            check_conversion(SourceDtype::Bf16, &bits.to_le_bytes(), f32::from_bits(u32::from(bits) << 16));
            check_conversion(SourceDtype::F16, &bits.to_le_bytes(), f16::from_bits(bits).to_f32());
            // Each FP16 value, the middle between it and the next, and the neighbours of both.
            let value = f16::from_bits(bits).to_f32();
            let next = f16::from_bits(bits.wrapping_add(1)).to_f32();
            for value in [value, (value + next) / 2.0] {
                for value in [value.next_down(), value, value.next_up()] {
                    check_conversion(SourceDtype::F32, &value.to_le_bytes(), value);
                }
            }
        }
        for bits in (0..=u32::MAX).step_by(65_521) {
            check_conversion(SourceDtype::F32, &bits.to_le_bytes(), f32::from_bits(bits));
        }
    }

    fn check_conversion(dtype: SourceDtype, bytes: &[u8], value: f32) {
        // Nine elements pass both the vectorised body and the remainder of a conversion.
        let mut converted = [f16::ONE; 9];
        let result = convert(dtype, &bytes.repeat(9), &mut converted);
        match reference_f16(value) {
            Some(expected) => {
                assert!(converted.iter().all(|value| value.to_bits() == expected), "{value:e}");
                let back = f16::from_bits(expected).to_f32();
                let exact = 9 * u64::from(back == value);
                let flushed = 9 * u64::from(back == 0.0 && value != 0.0);
                let counts = Counts { exact, flushed, rounded: 9 - exact - flushed };
                assert_eq!(result.ok(), Some(counts), "{value:e}");
            }
            None => {
                let bad = result.unwrap_err();
                assert_eq!(
                    (bad.element, bad.value.to_bits() & !(1 << 22)),
                    (0, value.to_bits() & !(1 << 22))
                );
            }
        }
    }

    #[test]
    fn conversion_by_hand() {
        let mut values = [f16::ZERO; 8];
        let source = [1.0, -0.0, 65504.0, 1.0 + 1.0 / 2048.0, 1.0 + 3.0 / 2048.0, 2e-8, 3e-8, -6e-8f32];
        let bytes: Vec<u8> = source.iter().flat_map(|value| value.to_le_bytes()).collect();
        let counts =
            convert(SourceDtype::F32, &bytes, &mut values).unwrap_or_else(|bad| panic!("{}", bad.value));
        let bits = [0x3c00, 0x8000, 0x7bff, 0x3c00, 0x3c02, 0, 1, 0x8001];
        assert_eq!(values.map(f16::to_bits), bits);
        assert_eq!(counts, Counts { exact: 3, rounded: 4, flushed: 1 });
    }

    #[test]
    fn values_that_fp16_cannot_hold_are_named() {
        let places = [
            (0, 41, "model.embed_tokens.weight[1, 1]"),
            (1, 39, "model.layers.0.input_layernorm.weight[39]"),
            (5, 11, "model.layers.0.self_attn.k_proj.bias[11]"),
            (24, 39 * 72 + 71, "model.layers.1.mlp.down_proj.weight[39, 71]"),
        ];
        for dtypes in DTYPES {
            for (index, element, name) in places {
                let mut source = Memory::random(&TINY, dtypes);
                source.set(index, element, f32::NEG_INFINITY);
                let error = pack(&TINY, &source, 64 * 7).unwrap_err();
                assert!(matches!(error, PackError::NonFinite { .. }));
                assert_eq!(error.to_string(), format!("{name} is -inf; a weight must be a finite number"));

                source.set(index, element, f32::NAN);
                assert!(matches!(pack(&TINY, &source, 64 * 7), Err(PackError::NonFinite { .. })));

                if source.dtype(index) != SourceDtype::F16 {
                    source.set(index, element, 65536.0);
                    let error = pack(&TINY, &source, 64 * 7).unwrap_err();
                    assert!(matches!(error, PackError::Overflow { .. }));
                    assert_eq!(
                        error.to_string(),
                        format!("{name} is 65536, beyond FP16's largest value 65504")
                    );
                }
            }
        }
    }

    #[test]
    fn a_short_source_is_named() {
        let mut source = Memory::random(&TINY, DTYPES[0]);
        source.0[24].1.pop();
        let error = pack(&TINY, &source, 1 << 30).unwrap_err();
        assert!(
            matches!(&error, PackError::Read { error, .. } if error.kind() == io::ErrorKind::UnexpectedEof)
        );
        assert!(
            error.to_string().starts_with("reading tensor model.layers.1.mlp.down_proj.weight: "),
            "{error}"
        );
    }

    #[test]
    #[should_panic = "outside an arena"]
    fn a_range_beyond_the_arena_panics() {
        let source = Memory::random(&TINY, DTYPES[0]);
        let layout = qwen2_weights_layout(&TINY);
        let mut counts = vec![Counts::default(); qwen2_source_count(&TINY)];
        let (at, scratch) = (layout.arena_bytes - 64, &mut PackScratch::new());
        let _ = pack_arena_range(&TINY, &layout, &source, at, &mut [0; 128], &mut counts, scratch);
    }
}
