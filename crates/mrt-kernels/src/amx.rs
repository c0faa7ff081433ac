//! The fast lane of AMX-BF16: `tdpbf16ps` multiplies a tile of 16 rows of 32 activations by one of 32 inputs to 16 columns, and
//! adds the products to a tile of 16 rows of 16 f32 sums.
//!
//! Numbers are rounded as in [`bf16`](crate::bf16). The products of 32 inputs are added up first, those of even and of odd ones
//! apart, then added to the sums. (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.)
//!
//! The compiler does not know of tiles: what is in them stays from one piece of assembly to the next.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::LazyLock;

use half::f16;

use crate::attention::{self, AttentionProducts, KvGroup};
use crate::avx512;
use crate::bf16;
use crate::fast::{FAST_STEP as STEP, fast_len};
use crate::panel::{LANES, PANEL};
use crate::product::{Lhs, Sums, start_from_bias};
use crate::window::Window;

/// As on the processors that this lane is for.
pub(crate) type Lanes16 = avx512::Lanes16<true>;

/// Fewer rows are bound by memory: exact products are as fast. On Emerald Rapids 9 rows took 1.06 to 1.10 times as long, 12 rows 0.92
/// to 0.97 times, 16 rows 0.74 times.
pub(crate) const LEAST_ROWS: usize = 12;

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Bytes of a row of a tile.
const ROW_BYTES: usize = 64;

/// Bytes of a tile.
const TILE_BYTES: usize = TILE_ROWS * ROW_BYTES;

/// Asked once, as the kernel is.
static IS_DETECTED: LazyLock<bool> = LazyLock::new(|| {
    bf16::is_detected()
        && is_x86_feature_detected!("avx512f")
        && processor_has_tiles()
        && kernel_permits_tiles()
});

pub(crate) fn is_detected() -> bool {
    *IS_DETECTED
}

/// AMX-TILE and AMX-BF16.
fn processor_has_tiles() -> bool {
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx >> 22 & 0b101 == 0b101
}

/// Asks Linux for the tiles' room in what it saves of this process's threads, as it demands (arch_prctl,
/// ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA).
#[cfg(target_os = "linux")]
fn kernel_permits_tiles() -> bool {
    let mut result: i64 = 158;
    // SAFETY: the system call changes nothing but that permission. It leaves memory alone.
    unsafe {
        asm!(
            "syscall", inout("rax") result, in("rdi") 0x1023, in("rsi") 18,
            out("rcx") _, out("r11") _, options(nostack),
        );
    }
    result == 0
}

/// Other systems have not been tried.
#[cfg(not(target_os = "linux"))]
fn kernel_permits_tiles() -> bool {
    false
}

/// Rounds rows to BF16, nearest even, and packs them in tiles: of 16 rows those of 32 inputs after another, zeros where there are fewer.
///
/// # Safety
/// The machine has AVX512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(crate) unsafe fn pack_rows(lhs: Lhs<'_>, rows: Range<usize>, out: &mut [u16], scales: &mut [f32]) {
    scales.fill(1.0);
    let tiles = out.chunks_exact_mut(fast_len(TILE_ROWS, lhs.k));
    for (first, tiles) in rows.clone().step_by(TILE_ROWS).zip(tiles) {
        let count = TILE_ROWS.min(rows.end - first);
        for (start, tile) in (0..lhs.k).step_by(STEP).zip(tiles.as_chunks_mut::<{ TILE_ROWS * STEP }>().0) {
            for (r, out) in tile.as_chunks_mut::<STEP>().0.iter_mut().take(count).enumerate() {
                let x = &lhs.x[(first + r) * lhs.stride + start..][..STEP.min(lhs.k - start)];
                let mut padded = [0.0; STEP];
                let x = x.as_array().unwrap_or_else(|| {
                    padded[..x.len()].copy_from_slice(x);
                    &padded
                });
                // SAFETY: both arrays have 32 elements.
                unsafe { bf16::narrow_32(x.as_ptr(), out.as_mut_ptr()) };
            }
        }
    }
}

/// See [`crate::fast_attention`].
///
/// # Safety
/// The machine has AMX-BF16 and AVX512-BF16, and [`attention::check`] holds.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx2,fma,f16c")]
pub(crate) unsafe fn attention(group: KvGroup<'_>, out: &mut Window<'_>, scratch: &mut [f32]) {
    // SAFETY: the same contract.
    unsafe {
        let _tiles = Tiles::new();
        attention::attend::<Lanes16, AmxAttention>(group, out, scratch);
    }
}

struct AmxAttention;

impl AttentionProducts for AmxAttention {
    type Rows = Rows;

    #[inline(always)]
    unsafe fn queries(queries: &[f32], k: usize, room: &mut [f32]) -> Rows {
        let stride = k.next_multiple_of(STEP);
        let room = room.as_mut_ptr().cast::<u16>();
        for (r, x) in queries.chunks_exact(k).enumerate() {
            // SAFETY: `room` has room for `stride` numbers of 16 bits for each row.
            unsafe { bf16::pack_row(x, std::slice::from_raw_parts_mut(room.add(r * stride), stride)) };
        }
        Rows::strided(room, stride)
    }

    #[inline(always)]
    unsafe fn weights(weights: &mut [f32], stride: usize) -> Rows {
        // SAFETY: the same contract.
        unsafe { bf16::narrow_in_place(weights, stride) };
        Rows::strided(weights.as_ptr().cast(), 2 * stride)
    }

    #[inline(always)]
    unsafe fn add(rows: usize, x: Rows, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums) {
        for start in (0..k).step_by(attention::BLOCK) {
            // SAFETY: the contract of the trait: rows start .. of the panel are inside it, and columns start .. of `x`; `wide` is longer
            // than a block.
            unsafe {
                let block = attention::BLOCK.min(k - start);
                let panel = panel.add(start * PANEL);
                add_block(rows, x.skip_steps(start / STEP), block, panel, wide, sums.after(start));
            }
        }
    }
}

/// Rows of BF16 numbers. Distances are in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    x: *const u8,
    /// From one row of a tile to the next.
    row: usize,
    /// To the next 32 inputs.
    step: usize,
    /// To the next 16 rows.
    tile: usize,
}

impl Rows {
    /// Rows one after the other, `stride` numbers apart.
    fn strided(x: *const u16, stride: usize) -> Self {
        Rows { x: x.cast(), row: 2 * stride, step: ROW_BYTES, tile: TILE_ROWS * 2 * stride }
    }

    /// Rows of `k` inputs that [`pack_rows`] packed.
    pub fn packed(x: *const u16, k: usize) -> Self {
        let tile = fast_len(TILE_ROWS, k) * size_of::<u16>();
        Rows { x: x.cast(), row: ROW_BYTES, step: TILE_BYTES, tile }
    }

    /// All rows but the first `r`, a multiple of 16.
    ///
    /// # Safety
    /// There are at least as many.
    #[inline(always)]
    unsafe fn skip_rows(self, r: usize) -> Self {
        // SAFETY: the contract above.
        Rows { x: unsafe { self.x.add(r / TILE_ROWS * self.tile) }, ..self }
    }

    /// All inputs but the first `steps` times 32.
    ///
    /// # Safety
    /// There are at least as many.
    #[inline(always)]
    pub unsafe fn skip_steps(self, steps: usize) -> Self {
        // SAFETY: the contract above.
        Rows { x: unsafe { self.x.add(steps * self.step) }, ..self }
    }
}

/// What `ldtilecfg` reads: palette 1 has 8 tiles of up to 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Sets the sizes of this thread's tiles and fills them with zeros. Tiles 0 and 1 are of sums and 4 of activations, all of `first`
/// rows, 2, 3 and 5 the same of `second` rows; 6 and 7 are of weights.
///
/// # Safety
/// The machine has AMX; both are 1 to 16 rows.
#[inline(always)]
unsafe fn configure(first: usize, second: usize) {
    let mut config =
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    config.row_bytes[..8].fill(ROW_BYTES as u16);
    config.rows[..8].copy_from_slice(
        &[first, first, second, second, first, second, TILE_ROWS, TILE_ROWS].map(|rows| rows as u8),
    );
    // SAFETY: the contract above; the instruction reads 64 bytes.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags)) };
}

/// The tiles of this thread while they are in use. Then they are given up, so that the kernel need not save them.
pub(crate) struct Tiles;

impl Tiles {
    /// Tiles of 16 rows.
    ///
    /// # Safety
    /// The machine has AMX.
    #[inline(always)]
    pub unsafe fn new() -> Tiles {
        // SAFETY: the contract above.
        unsafe { configure(TILE_ROWS, TILE_ROWS) };
        Tiles
    }
}

impl Drop for Tiles {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: there are `Tiles` only where the machine has AMX.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

/// Continues the sums of `rows` rows with `k` inputs, no more than a block of attention.
///
/// # Safety
/// The machine has AMX-BF16 and AVX512-BF16, and its tiles have 16 rows; `x` has `rows` rows of `k` elements, and zeros after
/// them up to a multiple of 32; `panel` has `k` rows, `sums` has `rows` rows of 32; `wide` holds as many rows of 16
/// as inputs and zeros.
#[inline(always)]
unsafe fn add_block(rows: usize, x: Rows, k: usize, panel: *const f16, wide: &mut [f32], sums: Sums) {
    let steps = k.div_ceil(STEP);
    let b = wide.as_mut_ptr().cast::<__m512i>();
    let start = if sums.fresh { Start::Bias([0.0; PANEL]) } else { Start::Sums };
    // SAFETY: the contract above; half as many rows of 32 pairs, 4 bytes each, fit into `wide`.
    unsafe {
        bf16::pair_up(panel, k, steps * STEP, b);
        multiply(rows, x, steps, b, &start, sums, &mut Nothing);
    }
}

/// What sums begin from.
pub(crate) enum Start {
    /// These numbers, in all rows.
    Bias([f32; PANEL]),
    /// What is in memory.
    Sums,
}

impl Start {
    /// The biases of a panel.
    ///
    /// # Safety
    /// The machine has AVX-512; `panel` has the bias row.
    #[inline(always)]
    pub unsafe fn bias(panel: &[f16]) -> Start {
        let mut bias = [0.0; PANEL];
        // SAFETY: the contract above; it is a row.
        unsafe { start_from_bias::<Lanes16>(panel, &mut bias) };
        Start::Bias(bias)
    }
}

/// What the vector units do while tiles multiply.
pub(crate) trait Meanwhile {
    /// A part of it, after every step.
    ///
    /// # Safety
    /// The machine has the instruction set.
    unsafe fn step(&mut self);
}

struct Nothing;

impl Meanwhile for Nothing {
    #[inline(always)]
    unsafe fn step(&mut self) {}
}

/// Adds the products of `steps` times 32 inputs to `rows` rows of 32 sums.
///
/// # Safety
/// The machine has AMX-BF16 and what `meanwhile` needs, and its tiles have 16 rows; `x` has `rows` rows of so many inputs, `b` 32
/// vectors of pairs for each step.
#[inline(always)]
pub(crate) unsafe fn multiply(
    rows: usize,
    x: Rows,
    steps: usize,
    b: *const __m512i,
    start: &Start,
    sums: Sums,
    meanwhile: &mut impl Meanwhile,
) {
    // SAFETY: the contract above: these rows are there. For a rest that is not of whole tiles they are made shorter.
    unsafe {
        let whole = rows - rows % (2 * TILE_ROWS);
        for first in (0..whole).step_by(2 * TILE_ROWS) {
            tiles::<2>(x.skip_rows(first), steps, b, start, sums.skip_rows(first), meanwhile);
        }
        let (x, sums, rest) = (x.skip_rows(whole), sums.skip_rows(whole), rows - whole);
        if !rest.is_multiple_of(TILE_ROWS) {
            configure(rest.min(TILE_ROWS), if rest > TILE_ROWS { rest - TILE_ROWS } else { TILE_ROWS });
        }
        if rest > TILE_ROWS {
            tiles::<2>(x, steps, b, start, sums, meanwhile);
        } else if rest > 0 {
            tiles::<1>(x, steps, b, start, sums, meanwhile);
        }
        if !rest.is_multiple_of(TILE_ROWS) {
            configure(TILE_ROWS, TILE_ROWS);
        }
    }
}

/// [`multiply`] for `N` tiles of rows: two share what is loaded of `b`.
///
/// # Safety
/// As there, but the tiles have as many rows as there are.
#[inline(always)]
unsafe fn tiles<const N: usize>(
    mut x: Rows,
    steps: usize,
    b: *const __m512i,
    start: &Start,
    sums: Sums,
    meanwhile: &mut impl Meanwhile,
) {
    const { assert!(N == 1 || N == 2) };
    // SAFETY: the contract above. Rows of a tile are read and written at distances that are those of `x`, of pairs and of sums; with
    // a distance of 0 all are the bias.
    unsafe {
        let stride = sums.stride * size_of::<f32>();
        let (from, from_stride) = match start {
            Start::Bias(bias) => (bias.as_ptr(), 0),
            Start::Sums => (sums.y.cast_const(), stride),
        };
        asm!(
            "tileloadd tmm0, [{from} + {stride}]",
            "tileloadd tmm1, [{from} + {stride} + 64]",
            from = in(reg) from, stride = in(reg) from_stride, options(nostack, readonly, preserves_flags),
        );
        if N == 2 {
            asm!(
                "tileloadd tmm2, [{from} + {stride}]",
                "tileloadd tmm3, [{from} + {stride} + 64]",
                from = in(reg) from.byte_add(TILE_ROWS * from_stride), stride = in(reg) from_stride,
                options(nostack, readonly, preserves_flags),
            );
        }
        let mut b = b.cast::<u8>();
        for _ in 0..steps {
            asm!(
                "tileloadd tmm6, [{b} + {b_row}]",
                "tileloaddt1 tmm4, [{a} + {a_row}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                a = in(reg) x.x, a_row = in(reg) x.row,
                b = in(reg) b, b_row = in(reg) 2 * ROW_BYTES, options(nostack, readonly, preserves_flags),
            );
            if N == 2 {
                asm!(
                    "tileloaddt1 tmm5, [{a} + {a_row}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    a = in(reg) x.x.add(x.tile), a_row = in(reg) x.row, options(nostack, readonly, preserves_flags),
                );
            }
            meanwhile.step();
            x.x = x.x.wrapping_add(x.step);
            b = b.wrapping_add(2 * TILE_BYTES);
        }
        asm!(
            "tilestored [{y} + {stride}], tmm0",
            "tilestored [{y} + {stride} + 64], tmm1",
            y = in(reg) sums.y, stride = in(reg) stride, options(nostack, preserves_flags),
        );
        if N == 2 {
            asm!(
                "tilestored [{y} + {stride}], tmm2",
                "tilestored [{y} + {stride} + 64], tmm3",
                y = in(reg) sums.y.add(TILE_ROWS * sums.stride), stride = in(reg) stride,
                options(nostack, preserves_flags),
            );
        }
    }
}

/// Runs `iterations` rounds of independent `tdpbf16ps` in registers; the number of floating-point operations.
///
/// # Safety
/// The machine has AMX-BF16.
#[target_feature(enable = "avx512f")]
pub(crate) unsafe fn peak(iterations: u64) -> u64 {
    // SAFETY: the contract above; all tiles are of ones.
    unsafe {
        let _tiles = Tiles::new();
        let ones = [0x3f80u16; TILE_BYTES / 2];
        asm!(
            "tileloaddt1 tmm4, [{x} + {row}]", "tileloadd tmm5, [{x} + {row}]",
            "tileloadd tmm6, [{x} + {row}]", "tileloadd tmm7, [{x} + {row}]",
            x = in(reg) ones.as_ptr(), row = in(reg) ROW_BYTES, options(nostack, readonly, preserves_flags),
        );
        for _ in 0..iterations {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nomem, nostack, preserves_flags),
            );
        }
    }
    iterations * (4 * TILE_ROWS * LANES * STEP * 2) as u64
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::fast::tests::{lanes, noise, run};
    use crate::{panel_count, panel_len};

    /// By the manual: chains of multiply-adds of even and of odd inputs, added up every 32.
    fn by_hand(x: &[f32], k: usize, panels: &[f16], n: usize) -> Vec<f32> {
        let round = |x: f32| bf16::from_f32(x).to_f32();
        let sum = |x: &[f32], j: usize| {
            let panel = &panels[j / PANEL * panel_len(k)..];
            let weight = |i: usize| round(panel[(i + 1) * PANEL + j % PANEL].to_f32());
            let chain = |inputs: Range<usize>| {
                inputs.step_by(2).fold(0.0, |sum, i| round(x[i]).mul_add(weight(i), sum))
            };
            (0..k).step_by(STEP).fold(panel[j % PANEL].to_f32(), |sum, start| {
                let end = k.min(start + STEP);
                sum + (chain(start..end) + chain(start + 1..end))
            })
        };
        x.chunks(k).flat_map(|x| (0..n).map(move |j| sum(x, j))).collect()
    }

    #[test]
    fn sums_are_those_of_the_manual() {
        let Some(lane) = lanes().find(|lane| lane.name() == "fast-amx") else { return };
        for (rows, k, n) in [(1, 1, 1), (3, 33, 40), (16, 64, 32), (31, 95, 64), (32, 31, 33), (50, 2111, 32)]
        {
            let x = noise(3, rows * k, 3.0);
            let panels = noise(5, panel_count(n) * panel_len(k), 0.1);
            let panels: Vec<f16> = panels.into_iter().map(f16::from_f32).collect();
            assert!(run(lane, &x, rows, k, &panels, n) == by_hand(&x, k, &panels, n), "{rows} {k} {n}");
        }
    }
}
