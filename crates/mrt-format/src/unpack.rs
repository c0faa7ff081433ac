//! The way back: a source tensor's FP16 values, row-major, from the panels of the arena.

use std::io;

use crate::config::Qwen2Config;
use crate::layout::{PANEL, Qwen2Layout, ROW_BYTES, TensorEntry, TensorKind, panel_bytes};
use crate::source::{Segment, qwen2_source_tensors, segments};

/// Hands `write` the bytes of source tensor `index` (counted as in [`qwen2_source_tensors`]), in order, as row-major
/// little-endian FP16 values: exactly those that packing wrote. `read` fills a buffer with the arena's bytes from an
/// offset. Holds one panel of the arena and its 32 rows at a time.
///
/// # Errors
/// Those of `read` and `write`.
///
/// # Panics
/// If there is no such tensor.
pub fn unpack_tensor(
    cfg: &Qwen2Config,
    layout: &Qwen2Layout,
    index: usize,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    mut write: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (tensor, part) = find(cfg, layout, index);
    let Part { first_column, segment, pair } = part;
    if tensor.kind == TensorKind::Vector {
        let mut values = vec![0; 2 * segment.columns];
        read(tensor.span.offset, &mut values)?;
        return write(&values);
    }
    let is_bias = segment.bias == Some(index);
    let k = tensor.k as usize;
    let rows = if is_bias { 1 } else { k };
    let mut panel = vec![0; ROW_BYTES * rows];
    let mut out = Vec::new();
    let mut column = first_column;
    let end = first_column + segment.columns;
    while column < end {
        let (index, lane) = (column / PANEL, column % PANEL);
        let count = (PANEL - lane).min(end - column);
        // A panel of pairs has one of the two matrices; biases are a panel's first row.
        let index = pair.map_or(index, |which| 2 * index + which);
        let offset = tensor.span.offset + index as u64 * panel_bytes(k);
        read(offset + if is_bias { 0 } else { ROW_BYTES as u64 }, &mut panel)?;
        out.clear();
        out.resize(2 * count * rows, 0);
        let (values, _) = out.as_chunks_mut::<2>();
        for (i, row) in panel.as_chunks::<2>().0.chunks_exact(PANEL).enumerate() {
            for (j, value) in row[lane..lane + count].iter().enumerate() {
                values[j * rows + i] = *value;
            }
        }
        write(&out)?;
        column += count;
    }
    Ok(())
}

/// Where a source tensor is in a tensor of the arena.
struct Part {
    /// Its first column; of each of the two matrices for pairs.
    first_column: usize,
    segment: Segment,
    /// Which of the two matrices of a pair.
    pair: Option<usize>,
}

fn find(cfg: &Qwen2Config, layout: &Qwen2Layout, index: usize) -> (TensorEntry, Part) {
    for tensor in layout.tensors(cfg) {
        let mut first_column = 0;
        for (which, segment) in segments(cfg, &tensor).enumerate() {
            let pair = (tensor.kind == TensorKind::PanelPairs).then_some(which);
            if segment.weight == index || segment.bias == Some(index) {
                return (tensor, Part { first_column, segment, pair });
            }
            if pair.is_none() {
                first_column += segment.columns;
            }
        }
    }
    panic!("there is no tensor {index} among {}", qwen2_source_tensors(cfg).len());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::{Counts, PackScratch, SourceDtype, TensorSource, pack_arena_range};
    use crate::test_model::TINY;
    use crate::{qwen2_source_count, qwen2_weights_layout};

    /// Tensors of FP16 values that are all different.
    struct Numbered(Vec<Vec<u8>>);

    impl TensorSource for Numbered {
        fn dtype(&self, _index: usize) -> SourceDtype {
            SourceDtype::F16
        }

        fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.copy_from_slice(&self.0[index][byte_offset as usize..][..buf.len()]);
            Ok(())
        }
    }

    #[test]
    fn unpacking_undoes_packing() {
        let tied = Qwen2Config { tie_word_embeddings: true, ..TINY };
        let wide = Qwen2Config { hidden_size: 64, head_dim: 32, ..TINY };
        for cfg in [TINY, tied, wide] {
            let layout = qwen2_weights_layout(&cfg);
            let mut n = 0u16;
            let mut tensor = |t: crate::SourceTensor| {
                let values = (0..t.elements()).flat_map(|_| {
                    n = (n + 1) % 0x7c00;
                    n.to_le_bytes()
                });
                values.collect()
            };
            let source = Numbered(qwen2_source_tensors(&cfg).into_iter().map(&mut tensor).collect());
            let mut arena = vec![0; layout.arena_bytes as usize];
            let mut counts = vec![Counts::default(); qwen2_source_count(&cfg)];
            let scratch = &mut PackScratch::new();
            pack_arena_range(&cfg, &layout, &source, 0, &mut arena, &mut counts, scratch).unwrap();
            for (index, expected) in source.0.iter().enumerate() {
                let mut found = Vec::new();
                let read = |offset: u64, buf: &mut [u8]| {
                    buf.copy_from_slice(&arena[offset as usize..][..buf.len()]);
                    Ok(())
                };
                let write = |bytes: &[u8]| {
                    found.extend_from_slice(bytes);
                    Ok(())
                };
                unpack_tensor(&cfg, &layout, index, read, write).unwrap();
                assert!(found == *expected, "tensor {index}");
            }
        }
    }
}
