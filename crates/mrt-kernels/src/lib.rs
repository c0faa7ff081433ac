//! Kernels of `mruntime`: products with FP16 panels, and the row operations of a Qwen2 layer.
//!
//! Every operation is written once, over `Lanes`, a vector of 16 f32 lanes that each instruction set
//! implements in its own file (`portable`, `avx2`, `avx512`, `neon`). All paths give the same bits:
//!
//! * a product is one chain of fused multiply-adds per output, in ascending k, starting from the bias;
//! * a reduction runs in 16 lanes that are summed by one fixed tree;
//! * `exp` and SiLU are one sequence of IEEE operations (module `rows`).
//!
//! Nothing here allocates, starts threads or does I/O. An [`Isa`] is chosen once and passed to each operation.

mod attention;
mod fast;
mod gemv;
mod isa;
mod lanes;
mod panel;
mod peak;
mod product;
mod rows;
mod streams;
mod window;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_product;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod bf16;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod fp16;
#[cfg(target_arch = "x86_64")]
mod fp16_avx512;
#[cfg(target_arch = "aarch64")]
mod fp16_neon;
#[cfg(all(target_arch = "aarch64", feature = "kleidiai"))]
mod kleidiai;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub use attention::{KvGroup, attention, attention_scratch_len};
pub use fast::{
    FAST_ROWS, FastLane, FastLhs, Numerics, fast_attention, fast_len, fast_product, pack_fast_rows,
};
/// The element type of panels, of the `half` crate.
pub use half::f16;
pub use isa::Isa;
pub use panel::{PANEL, gather_column, panel_count, panel_len, store_k_lane, store_v_row};
pub use peak::{fast_peak, fma_peak, read_peak, read_peak_in_turn};
pub use product::{Epilogue, Lhs, Rhs, panel_product, pass_rows, product_scratch_len};
pub use rows::{rms_norm, rope, scale, softmax};
pub use streams::streamed_rows;
pub use window::Window;
