//! The forward pass of Qwen2, and the scratch memory that it works in.

use mrt_format::Qwen2Config;
use mrt_kernels::{Epilogue, Isa, Lhs, Numerics, Window};

use crate::arena::{ALIGNMENT, Arena, Bump, aligned_bytes};
use crate::error::Error;
use crate::kv_cache::{KvCache, KvShape, check_context, kv_cache_bytes};
use crate::ops::{self, Heads, Products};
use crate::platform::physical_memory;
use crate::pool::{MAX_THREADS, Pool};
use crate::weights::Qwen2Weights;

/// What the caller decides about memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Positions of the KV cache: prompt and answer together.
    pub context: usize,
    /// Tokens of a prefill step. More tokens read the weights less often, up to a point: 512 is enough.
    pub batch: usize,
    /// Threads of the pool.
    pub threads: usize,
}

/// Bytes of each arena. Mapped weights are no anonymous memory; a process takes about 1 MB of it beside KV cache and scratch,
/// for its data, stacks and the sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySizes {
    /// The weight arena, which is mapped from the file.
    pub weights: u64,
    /// Keys and values; pages are touched as positions are filled.
    pub kv_cache: u64,
    /// Activations and working memory of the threads.
    pub scratch: u64,
}

/// The arenas beside the weights.
pub struct Qwen2Arenas {
    /// For [`qwen2_init_kv_cache`](crate::qwen2_init_kv_cache).
    pub kv_cache: Arena,
    /// For [`qwen2_init_scratch`].
    pub scratch: Arena,
}

/// Bytes that a model of shape `cfg` needs under `limits`, before anything is allocated.
///
/// # Errors
/// When a limit is zero, the context is longer than the model was trained for, or there are more than [`MAX_THREADS`] threads.
pub fn qwen2_memory_sizes(cfg: &Qwen2Config, limits: &Limits) -> Result<MemorySizes, Error> {
    check_context(cfg, limits.context)?;
    if limits.batch == 0 || !(1..=MAX_THREADS).contains(&limits.threads) {
        return Err(Error::Limits { batch: limits.batch, threads: limits.threads });
    }
    let (f32s, packed) = scratch_lens(cfg, limits);
    Ok(MemorySizes {
        weights: mrt_format::qwen2_weights_layout(cfg).arena_bytes,
        kv_cache: kv_cache_bytes(cfg, limits.context),
        scratch: f32s
            .iter()
            .fold(aligned_bytes::<u16>(packed), |sum, &len| aligned_bytes::<f32>(len).saturating_add(sum)),
    })
}

/// Allocates the KV cache and scratch arenas.
///
/// # Errors
/// As [`qwen2_memory_sizes`], and when the memory is more than the machine has, or the system refuses it.
pub fn create_qwen2_arenas(cfg: &Qwen2Config, limits: &Limits) -> Result<Qwen2Arenas, Error> {
    let sizes = qwen2_memory_sizes(cfg, limits)?;
    // Linux may promise any amount, and end the process when it is used.
    let bytes = sizes.kv_cache.saturating_add(sizes.scratch);
    if let Some(memory) = physical_memory().filter(|&memory| bytes > memory) {
        let reason = format!("this machine has {memory}; take a smaller context or batch");
        return Err(Error::Memory { bytes, reason });
    }
    Ok(Qwen2Arenas { kv_cache: Arena::sparse(sizes.kv_cache)?, scratch: Arena::new(sizes.scratch)? })
}

/// Working memory of [`qwen2_forward`], and the instruction set that it runs on.
pub struct Scratch<'a> {
    batch: usize,
    /// `1 / theta^(2i / head_dim)`, `[head_dim / 2]`.
    frequencies: &'a mut [f32],
    /// For whoever has no logits of its own, `[vocab]`.
    pub(crate) logits: &'a mut [f32],
    /// What [`Activations`] are cut from.
    activations: &'a mut [f32],
    products: Products<'a>,
    /// At most so many threads of the pool work, in calls with several tokens and in calls with one.
    prefill_threads: usize,
    decode_threads: usize,
}

/// Activations of the tokens of a prefill step.
struct Activations<'a> {
    /// Residual stream, `[tokens][hidden]`.
    residual: &'a mut [f32],
    /// Input of the products, `[tokens][hidden]`.
    normed: &'a mut [f32],
    /// `[tokens][Q, K and V]`.
    qkv: &'a mut [f32],
    /// Rotated queries, `[kv head][token][head of the group][head_dim]`.
    q: &'a mut [f32],
    /// Output of attention, `[tokens][attention width]`.
    attended: &'a mut [f32],
    /// SwiGLU's output, `[tokens][intermediate]`.
    gated: &'a mut [f32],
    /// `[tokens][head_dim / 2]` each.
    cos: &'a mut [f32],
    sin: &'a mut [f32],
}

/// Elements of each field of [`Activations`] in its order, whole cache lines.
fn activation_lens(cfg: &Qwen2Config, tokens: usize) -> [usize; 8] {
    let (hidden, half_head) = (cfg.hidden_size as usize, cfg.head_dim as usize / 2);
    let (attention, mlp) = (cfg.attention_width(), cfg.intermediate_size as usize);
    let widths = [hidden, hidden, cfg.qkv_columns(), attention, attention, mlp, half_head, half_head];
    let line = ALIGNMENT / size_of::<f32>();
    widths.map(|width| width.saturating_mul(tokens).checked_next_multiple_of(line).unwrap_or(usize::MAX))
}

impl<'a> Activations<'a> {
    /// Cuts them off the front of `memory`, side by side, so that few tokens touch few pages.
    fn cut(cfg: &Qwen2Config, tokens: usize, memory: &'a mut [f32]) -> Self {
        let mut rest = memory;
        let [residual, normed, qkv, q, attended, gated, cos, sin] = activation_lens(cfg, tokens)
            .map(|len| rest.split_off_mut(..len).expect("scratch memory of another config"));
        Activations { residual, normed, qkv, q, attended, gated, cos, sin }
    }
}

/// Elements of each f32 slice of [`Scratch`], in the order of allocation, and of `packed`, which follows them.
fn scratch_lens(cfg: &Qwen2Config, limits: &Limits) -> ([usize; 5], usize) {
    let activations = activation_lens(cfg, limits.batch).into_iter().fold(0, usize::saturating_add);
    let widest = (cfg.hidden_size as usize).max(cfg.attention_width()).max(cfg.intermediate_size as usize);
    let f32s = [
        cfg.head_dim as usize / 2,
        cfg.vocab_size as usize,
        worker_len(cfg, limits).saturating_mul(limits.threads),
        limits.batch,
        activations,
    ];
    (f32s, mrt_kernels::fast_len(limits.batch, widest))
}

/// Elements of scratch of one thread; a multiple of two cache lines, so that threads share none.
fn worker_len(cfg: &Qwen2Config, limits: &Limits) -> usize {
    let kv = KvShape::new(cfg, limits.context);
    let attention =
        ops::attention_scratch_len(&kv, (cfg.num_heads / cfg.num_kv_heads) as usize, limits.batch);
    let len = attention.max(mrt_kernels::product_scratch_len(limits.batch));
    len.checked_next_multiple_of(32).unwrap_or(usize::MAX)
}

/// Cuts the scratch memory out of an arena and prepares the RoPE frequencies.
///
/// # Errors
/// As [`qwen2_memory_sizes`], and when the arena has fewer bytes left than it says.
pub fn qwen2_init_scratch<'a>(
    cfg: &Qwen2Config,
    limits: &Limits,
    isa: Isa,
    arena: &mut Bump<'a>,
) -> Result<Scratch<'a>, Error> {
    qwen2_memory_sizes(cfg, limits)?;
    let (f32s, packed) = scratch_lens(cfg, limits);
    let mut lens = f32s.into_iter();
    let mut next = || arena.alloc::<f32>(lens.next().unwrap_or_default());
    let (frequencies, logits, workers, scales, activations) = (next()?, next()?, next()?, next()?, next()?);
    let packed = arena.alloc::<u16>(packed)?;
    let worker_len = worker_len(cfg, limits);
    let scratch = Scratch {
        batch: limits.batch,
        frequencies,
        logits,
        activations,
        products: Products { isa, numerics: Numerics::Exact, workers, worker_len, packed, scales },
        prefill_threads: usize::MAX,
        decode_threads: usize::MAX,
    };
    for (i, f) in scratch.frequencies.iter_mut().enumerate() {
        // f64 rounded once: what Hugging Face computes in f32, to the last bit or the one beside it.
        *f = libm::pow(cfg.rope_theta, -(2.0 * i as f64) / f64::from(cfg.head_dim)) as f32;
    }
    Ok(scratch)
}

impl Scratch<'_> {
    /// Tokens of a prefill step.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// The instruction set that the forward pass runs on.
    pub fn isa(&self) -> Isa {
        self.products.isa
    }

    /// What the following forward passes trade for speed; at first nothing.
    ///
    /// With [`Numerics::Fast`] logits no longer are the same bits for every batch and on every machine.
    pub fn set_numerics(&mut self, numerics: Numerics) {
        self.products.numerics = numerics;
    }

    /// Lets the following forward passes use the first threads of the pool only: of several tokens `prefill` of them, of one
    /// token `decode`; at first all. Decoding is bound by memory and can be fastest on fewer. The results are the same.
    ///
    /// # Panics
    /// When a number is 0.
    pub fn set_threads(&mut self, prefill: usize, decode: usize) {
        assert!(prefill > 0 && decode > 0, "{prefill} and {decode} threads");
        (self.prefill_threads, self.decode_threads) = (prefill, decode);
    }

    /// What forward passes trade for speed.
    pub fn numerics(&self) -> Numerics {
        self.products.numerics
    }

    /// At most so many threads of the pool work: of several tokens, and of one. `usize::MAX` for all.
    pub fn threads(&self) -> (usize, usize) {
        (self.prefill_threads, self.decode_threads)
    }
}

/// Runs `tokens` through the model at the next positions of `kv`, and writes logits (f32, one for each token id).
///
/// The length of `logits` says which: `vocab_size` elements for the last token, `tokens.len() * vocab_size` for
/// every token, none for no logits. However the tokens of a text are divided among calls, and whatever the
/// batch size, number of threads and instruction set, the logits have the same bits.
///
/// # Errors
/// When `tokens` is empty or does not fit into the context, or a token id is not below the vocabulary's size. The
/// cache is then as it was.
///
/// # Panics
/// If `logits` has another length, `kv` was made for another config or a longer context than `scratch`, or more threads of
/// the pool work than `scratch` was made for.
pub fn qwen2_forward(
    cfg: &Qwen2Config,
    weights: &Qwen2Weights<'_>,
    kv: &mut KvCache<'_>,
    scratch: &mut Scratch<'_>,
    tokens: &[u32],
    logits: &mut [f32],
    pool: &mut Pool,
) -> Result<(), Error> {
    qwen2_forward_observed(cfg, weights, kv, scratch, tokens, logits, pool, |_| ())
}

/// Where in the forward pass an [`Observation`] is made: after the operation of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Token embeddings, the beginning of the residual stream: `[tokens][hidden]`.
    Embed,
    /// RMSNorm before attention: `[tokens][hidden]`.
    AttnNorm,
    /// Q, K and V before RoPE: `[tokens][Q, K and V]`.
    Qkv,
    /// Queries after RoPE, divided by sqrt(head_dim): `[kv head][token][head of the group][head_dim]`.
    Rope,
    /// Output of the attention heads: `[tokens][heads * head_dim]`.
    Attention,
    /// The residual stream after attention: `[tokens][hidden]`.
    AttnOut,
    /// RMSNorm before the MLP: `[tokens][hidden]`.
    MlpNorm,
    /// SwiGLU of gate and up: `[tokens][intermediate]`.
    GateUp,
    /// The residual stream after the layer, its hidden states: `[tokens][hidden]`.
    Down,
    /// RMSNorm after the last layer, of the tokens whose logits are wanted: `[tokens][hidden]`.
    FinalNorm,
    /// Logits: `[tokens][vocab]`.
    LmHead,
}

/// What an operation of the forward pass has computed.
#[derive(Clone, Copy, Debug)]
pub struct Observation<'a> {
    /// The operation.
    pub stage: Stage,
    /// The decoder layer, from 0; after the last one their number.
    pub layer: usize,
    /// Position of the first token.
    pub position: usize,
    /// Tokens.
    pub tokens: usize,
    /// The values; the stage says in which shape.
    pub values: &'a [f32],
}

/// [`qwen2_forward`], which shows `observe` what each operation has computed, in order: for each prefill step
/// [`Stage::Embed`], for each layer the stages from [`AttnNorm`](Stage::AttnNorm) to [`Down`](Stage::Down), then, where
/// logits are wanted, [`FinalNorm`](Stage::FinalNorm) and [`LmHead`](Stage::LmHead). The time between two calls is the
/// operation's. Observing changes no result.
///
/// # Errors
/// As [`qwen2_forward`].
///
/// # Panics
/// As [`qwen2_forward`], and when `observe` does. The pool then keeps the number of threads of that pass.
#[expect(clippy::too_many_arguments, reason = "flat: all state that takes part is named at the call")]
pub fn qwen2_forward_observed(
    cfg: &Qwen2Config,
    weights: &Qwen2Weights<'_>,
    kv: &mut KvCache<'_>,
    scratch: &mut Scratch<'_>,
    tokens: &[u32],
    logits: &mut [f32],
    pool: &mut Pool,
    mut observe: impl FnMut(Observation<'_>),
) -> Result<(), Error> {
    check_tokens(cfg, kv, tokens)?;
    assert_eq!(kv.shape(), KvShape::new(cfg, kv.context()), "a cache of another config");
    let (hidden, vocab) = (cfg.hidden_size as usize, cfg.vocab_size as usize);
    let (attention, mlp) = (cfg.attention_width(), cfg.intermediate_size as usize);
    let all = logits.len() == tokens.len() * vocab;
    assert!(all || logits.len() == vocab || logits.is_empty(), "{} logits", logits.len());
    let pool_threads = pool.threads();
    let phase = if tokens.len() == 1 { scratch.decode_threads } else { scratch.prefill_threads };
    pool.set_threads(phase.min(pool_threads));
    let eps = cfg.rms_norm_eps as f32;
    let Scratch { batch, frequencies, activations, products, .. } = scratch;
    let isa = products.isa;
    let group = (cfg.num_heads / cfg.num_kv_heads) as usize;

    for (c, chunk) in tokens.chunks(*batch).enumerate() {
        let n = chunk.len();
        let heads = Heads { kv: kv.shape(), group, tokens: n, start: kv.len() };
        let position = kv.len();
        let mut observe = |stage, layer, values: &[f32], tokens| {
            observe(Observation { stage, layer, position, tokens, values });
        };
        let Activations { residual, normed, qkv, q, attended, gated, cos, sin } =
            Activations::cut(cfg, n, activations);
        rope_table(frequencies, kv.len(), cos, sin, n);
        let residual = &mut residual[..n * hidden];
        let normed = &mut normed[..n * hidden];
        ops::embed(weights.embedding(), chunk, hidden, residual, pool);
        observe(Stage::Embed, 0, residual, n);

        for i in 0..cfg.num_layers as usize {
            let layer = weights.layer(i);
            let (k, v) = kv.layer_mut(i);

            ops::rms_norm(isa, residual, layer.attn_norm, eps, normed, pool);
            observe(Stage::AttnNorm, i, normed, n);
            let lhs = Lhs { x: normed, rows: n, stride: hidden, k: hidden };
            let out = Window::new(qkv, n, cfg.qkv_columns(), cfg.qkv_columns());
            ops::linear(products, lhs, layer.qkv, Epilogue::Store, out, pool);
            observe(Stage::Qkv, i, &qkv[..n * cfg.qkv_columns()], n);
            ops::rope_and_store(isa, heads, qkv, (cos, sin), q, (k, v), pool);
            observe(Stage::Rope, i, &q[..n * attention], n);
            let out = &mut attended[..n * attention];
            ops::attention(products, heads, q, (k, v), out, pool);
            observe(Stage::Attention, i, &attended[..n * attention], n);
            let lhs = Lhs { x: attended, rows: n, stride: attention, k: attention };
            let out = Window::new(residual, n, hidden, hidden);
            ops::linear(products, lhs, layer.attn_out, Epilogue::Add, out, pool);
            observe(Stage::AttnOut, i, residual, n);

            ops::rms_norm(isa, residual, layer.mlp_norm, eps, normed, pool);
            observe(Stage::MlpNorm, i, normed, n);
            let lhs = Lhs { x: normed, rows: n, stride: hidden, k: hidden };
            let out = Window::new(gated, n, mlp, mlp);
            ops::linear(products, lhs, layer.gate_up, Epilogue::SwiGlu, out, pool);
            observe(Stage::GateUp, i, &gated[..n * mlp], n);
            let lhs = Lhs { x: gated, rows: n, stride: mlp, k: mlp };
            let out = Window::new(residual, n, hidden, hidden);
            ops::linear(products, lhs, layer.down, Epilogue::Add, out, pool);
            observe(Stage::Down, i, residual, n);
        }
        kv.advance(n);

        let first = c * *batch;
        let wanted = match logits.len() {
            0 => continue,
            _ if all => 0,
            _ if first + n == tokens.len() => n - 1,
            _ => continue,
        };
        let logits = if all { &mut logits[first * vocab..(first + n) * vocab] } else { &mut *logits };
        let normed = &mut normed[wanted * hidden..];
        ops::rms_norm(isa, &residual[wanted * hidden..], weights.final_norm(), eps, normed, pool);
        observe(Stage::FinalNorm, cfg.num_layers as usize, normed, n - wanted);
        let lhs = Lhs { x: normed, rows: n - wanted, stride: hidden, k: hidden };
        let out = Window::new(logits, n - wanted, vocab, vocab);
        ops::linear(products, lhs, weights.lm_head(), Epilogue::Store, out, pool);
        observe(Stage::LmHead, cfg.num_layers as usize, logits, n - wanted);
    }
    pool.set_threads(pool_threads);
    Ok(())
}

fn check_tokens(cfg: &Qwen2Config, kv: &KvCache<'_>, tokens: &[u32]) -> Result<(), Error> {
    if tokens.is_empty() {
        return Err(Error::NoTokens);
    }
    if tokens.len() > kv.context() - kv.len() {
        return Err(Error::ContextFull { tokens: tokens.len(), used: kv.len(), context: kv.context() });
    }
    check_ids(cfg, tokens)
}

pub(crate) fn check_ids(cfg: &Qwen2Config, tokens: &[u32]) -> Result<(), Error> {
    match tokens.iter().position(|&t| t >= cfg.vocab_size) {
        Some(index) => Err(Error::TokenId { id: tokens[index], index, vocab: cfg.vocab_size }),
        None => Ok(()),
    }
}

/// Cosines and sines of the angles `position * frequency` for `n` positions from `start` on; the angle is rounded
/// to f32 first, as Hugging Face does.
fn rope_table(frequencies: &[f32], start: usize, cos: &mut [f32], sin: &mut [f32], n: usize) {
    let half = frequencies.len();
    for t in 0..n {
        let position = (start + t) as f32;
        for (i, f) in frequencies.iter().enumerate() {
            let angle = position * f;
            cos[t * half + i] = libm::cosf(angle);
            sin[t * half + i] = libm::sinf(angle);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::qwen2_init_kv_cache;
    use mrt_kernels::{FastLane, f16};

    pub(crate) const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 80,
        intermediate_size: 100,
        num_layers: 2,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 40,
        vocab_size: 75,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: true,
    };

    /// An arena of random numbers in -0.25 .. 0.25: any arena is a model.
    pub(crate) fn random_arena() -> Arena {
        let mut arena = Arena::new(mrt_format::qwen2_weights_layout(&CFG).arena_bytes).unwrap();
        let mut s = 1u32;
        for bytes in arena.bytes_mut().chunks_exact_mut(2) {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = (s >> 8) as f32 / (1 << 23) as f32 - 1.0;
            bytes.copy_from_slice(&f16::from_f32(x * 0.25).to_le_bytes());
        }
        arena
    }

    pub(crate) fn tokens(n: usize) -> Vec<u32> {
        (0..n as u32).map(|i| (i * 37 + 11) % CFG.vocab_size).collect()
    }

    /// The logits of every token, computed with calls of `split` tokens.
    fn logits(tokens: &[u32], limits: Limits, isa: Isa, split: usize) -> Vec<u32> {
        logits_with(Numerics::Exact, tokens, limits, isa, split)
    }

    fn logits_with(numerics: Numerics, tokens: &[u32], limits: Limits, isa: Isa, split: usize) -> Vec<u32> {
        let weights = random_arena();
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        let mut arenas = create_qwen2_arenas(&CFG, &limits).unwrap();
        // Whatever the scratch memory holds must not matter.
        bytemuck::cast_slice_mut::<u8, f32>(&mut arenas.scratch.bytes_mut()[..64]).fill(f32::NAN);
        let mut kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
        let mut scratch = qwen2_init_scratch(&CFG, &limits, isa, &mut arenas.scratch.bump()).unwrap();
        scratch.set_numerics(numerics);
        let mut pool = Pool::new(limits.threads).unwrap();
        let mut all = vec![0.0; tokens.len() * CFG.vocab_size as usize];
        for (tokens, logits) in tokens.chunks(split).zip(all.chunks_mut(split * CFG.vocab_size as usize)) {
            qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, tokens, logits, &mut pool).unwrap();
        }
        assert_eq!(kv.len(), tokens.len());
        all.iter().map(|x| x.to_bits()).collect()
    }

    /// What a fast lane promises: nothing depends on the number of threads, and results are near the exact ones.
    #[test]
    fn fast_lanes_give_the_same_bits_on_every_number_of_threads() {
        let tokens = tokens(37);
        let lanes = Isa::supported().flat_map(|isa| FastLane::supported(isa).map(move |lane| (isa, lane)));
        for (isa, lane) in lanes {
            let fast = Numerics::Fast(lane);
            let limits = |threads| Limits { context: 37, batch: 37, threads };
            let exact = logits(&tokens, limits(1), isa, 37);
            // 17 tokens end in a group of one row.
            for split in [1, 17, 37] {
                let want = logits_with(fast, &tokens, limits(1), isa, split);
                for threads in [2, 3, 8] {
                    let got = logits_with(fast, &tokens, limits(threads), isa, split);
                    assert!(got == want, "{} threads {threads} split {split}", fast.name());
                }
                let number = |x: &u32| f64::from(f32::from_bits(*x));
                let square: f64 = exact.iter().map(|x| number(x).powi(2)).sum();
                let error: f64 = exact.iter().zip(&want).map(|(x, y)| (number(x) - number(y)).powi(2)).sum();
                // A 16-bit format rounds each product's inputs to 2^-8 or less; nine products follow one another.
                assert!(
                    (error / square).sqrt() < 9.0 / 256.0,
                    "{} split {split}: {error} of {square}",
                    fast.name()
                );
            }
        }
    }

    #[test]
    fn the_logits_have_the_same_bits_however_they_are_computed() {
        let tokens = tokens(70);
        let limits = Limits { context: 70, batch: 70, threads: 1 };
        let want = logits(&tokens, limits, Isa::PORTABLE, 1);
        assert!(want.iter().all(|&x| f32::from_bits(x).is_finite()));
        for isa in Isa::supported() {
            for threads in [1, 2, 3, 8] {
                for (split, batch) in [(1, 1), (2, 4), (7, 7), (32, 32), (70, 70), (70, 7), (70, 64)] {
                    let limits = Limits { context: 100, batch, threads };
                    let got = logits(&tokens, limits, isa, split);
                    assert!(got == want, "{} threads {threads} split {split} batch {batch}", isa.name());
                }
            }
        }
    }

    #[test]
    fn the_logits_asked_for_are_the_ones_given() {
        let (tokens, vocab) = (tokens(9), CFG.vocab_size as usize);
        let limits = Limits { context: 9, batch: 4, threads: 1 };
        let want = logits(&tokens, limits, Isa::PORTABLE, 9);
        let weights = random_arena();
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        let mut arenas = create_qwen2_arenas(&CFG, &limits).unwrap();
        let mut kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
        let mut scratch =
            qwen2_init_scratch(&CFG, &limits, Isa::PORTABLE, &mut arenas.scratch.bump()).unwrap();
        let mut pool = Pool::new(1).unwrap();
        let mut last = vec![0.0; vocab];
        qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens, &mut last, &mut pool).unwrap();
        let last: Vec<u32> = last.iter().map(|x| x.to_bits()).collect();
        assert!(last == want[8 * vocab..]);
        // A cache that is cut and filled again is as good as new.
        kv.truncate(3);
        qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens[3..7], &mut [], &mut pool).unwrap();
        let mut rest = vec![0.0; 2 * vocab];
        qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens[7..], &mut rest, &mut pool).unwrap();
        let rest: Vec<u32> = rest.iter().map(|x| x.to_bits()).collect();
        assert!(rest == want[7 * vocab..]);
    }

    #[test]
    fn every_operation_is_observed_once_in_order_with_its_values() {
        let weights = random_arena();
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        let limits = Limits { context: 9, batch: 4, threads: 2 };
        let mut arenas = create_qwen2_arenas(&CFG, &limits).unwrap();
        let mut kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
        let mut scratch =
            qwen2_init_scratch(&CFG, &limits, Isa::detect(), &mut arenas.scratch.bump()).unwrap();
        let mut pool = Pool::new(2).unwrap();
        let (tokens, vocab) = (tokens(7), CFG.vocab_size as usize);
        let mut logits = vec![0.0; vocab];
        let (mut seen, mut residual, mut last) = (Vec::new(), Vec::new(), Vec::new());
        let observe = |o: Observation<'_>| {
            seen.push((o.stage, o.layer, o.position, o.tokens));
            let width = o.values.len() / o.tokens;
            let expected = match o.stage {
                Stage::Qkv => CFG.qkv_columns(),
                Stage::Rope | Stage::Attention => CFG.attention_width(),
                Stage::GateUp => CFG.intermediate_size as usize,
                Stage::LmHead => vocab,
                _ => CFG.hidden_size as usize,
            };
            assert_eq!((width, o.values.len()), (expected, expected * o.tokens));
            match o.stage {
                Stage::Embed => residual = o.values.to_vec(),
                Stage::AttnOut | Stage::Down => {
                    assert_ne!(o.values, residual);
                    residual = o.values.to_vec();
                }
                Stage::LmHead => last = o.values.to_vec(),
                _ => {}
            }
        };
        qwen2_forward_observed(
            &CFG,
            &weights,
            &mut kv,
            &mut scratch,
            &tokens,
            &mut logits,
            &mut pool,
            observe,
        )
        .unwrap();
        let layer = [
            Stage::AttnNorm,
            Stage::Qkv,
            Stage::Rope,
            Stage::Attention,
            Stage::AttnOut,
            Stage::MlpNorm,
            Stage::GateUp,
            Stage::Down,
        ];
        let mut expected = Vec::new();
        for (position, n) in [(0, 4), (4, 3)] {
            expected.push((Stage::Embed, 0, position, n));
            expected.extend((0..2).flat_map(|i| layer.map(|stage| (stage, i, position, n))));
        }
        expected.extend([(Stage::FinalNorm, 2, 4, 1), (Stage::LmHead, 2, 4, 1)]);
        assert_eq!(seen, expected);
        assert_eq!(last, logits);
        // The same without an observer.
        kv.truncate(0);
        let mut again = vec![0.0; vocab];
        qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens, &mut again, &mut pool).unwrap();
        assert_eq!(again, logits);
    }

    #[test]
    fn prefill_and_decoding_use_their_threads_and_give_the_same_bits() {
        let (tokens, vocab) = (tokens(9), CFG.vocab_size as usize);
        let limits = Limits { context: 9, batch: 8, threads: 3 };
        let want = logits(&tokens, limits, Isa::detect(), 9);
        let weights = random_arena();
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        for (prefill, decode) in [(1, 1), (3, 1), (1, 2), (2, 3), (8, 8)] {
            let mut arenas = create_qwen2_arenas(&CFG, &limits).unwrap();
            let mut kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
            let mut scratch =
                qwen2_init_scratch(&CFG, &limits, Isa::detect(), &mut arenas.scratch.bump()).unwrap();
            scratch.set_threads(prefill, decode);
            let mut pool = Pool::new(3).unwrap();
            let (mut got, mut rest) = (vec![0.0; 8 * vocab], vec![0.0; vocab]);
            qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens[..8], &mut got, &mut pool).unwrap();
            qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, &tokens[8..], &mut rest, &mut pool).unwrap();
            assert_eq!(pool.threads(), 3);
            assert!(got.iter().chain(&rest).map(|x| x.to_bits()).eq(want.iter().copied()));
        }
    }

    #[test]
    fn bad_tokens_are_refused_and_change_nothing() {
        let weights = random_arena();
        let weights = Qwen2Weights::from_arena(&CFG, weights.bytes()).unwrap();
        let limits = Limits { context: 5, batch: 4, threads: 1 };
        let mut arenas = create_qwen2_arenas(&CFG, &limits).unwrap();
        let mut kv = qwen2_init_kv_cache(&CFG, limits.context, &mut arenas.kv_cache.bump()).unwrap();
        let mut scratch =
            qwen2_init_scratch(&CFG, &limits, Isa::PORTABLE, &mut arenas.scratch.bump()).unwrap();
        let mut pool = Pool::new(1).unwrap();
        for (tokens, message) in [
            (&[][..], "no tokens: the prompt is empty"),
            (&[1, 75], "token 75 at index 1 is outside the vocabulary of 75 tokens"),
            (&[1; 6], "6 tokens do not fit into the context of 5, of which 0 are used"),
        ] {
            let result = qwen2_forward(&CFG, &weights, &mut kv, &mut scratch, tokens, &mut [], &mut pool);
            assert_eq!(result.unwrap_err().to_string(), message);
            assert!(kv.is_empty());
        }
    }

    #[test]
    fn impossible_limits_are_refused_before_anything_is_allocated() {
        let sizes = |context, batch, threads| qwen2_memory_sizes(&CFG, &Limits { context, batch, threads });
        let mut arenas = create_qwen2_arenas(&CFG, &Limits { context: 64, batch: 64, threads: 2 }).unwrap();
        for (context, batch, threads) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1025), (1 << 60, 1, 1)] {
            assert!(sizes(context, batch, threads).is_err());
            let limits = Limits { context, batch, threads };
            let scratch = qwen2_init_scratch(&CFG, &limits, Isa::PORTABLE, &mut arenas.scratch.bump());
            assert!(matches!(scratch.err(), Some(Error::Limits { .. } | Error::Context { .. })));
            let kv = qwen2_init_kv_cache(&CFG, context, &mut arenas.kv_cache.bump());
            assert_eq!(kv.is_ok(), context == 1);
        }
        for context in [1 << 60, usize::MAX] {
            let error = sizes(context, 1, 1).unwrap_err().to_string();
            assert!(error.contains(&format!("{} bytes", u64::MAX)), "{error}");
        }
        for batch in [1 << 58, usize::MAX] {
            assert_eq!(sizes(1, batch, 1).unwrap().scratch, u64::MAX);
        }
        let error = sizes(1 << 40, 1, 1).unwrap_err().to_string();
        let kv = 2 * 2 * ((1u64 << 35) * 41 + 2 * ((1 << 40) + 1)) * 64;
        assert!(
            error.contains(&format!("{} tokens", 1u64 << 40)) && error.contains(&format!("{kv} bytes")),
            "{error}"
        );
        // As long as the model was trained for, and still more than a machine has.
        let cfg = Qwen2Config { max_position_embeddings: 1 << 31, num_layers: 10_000, ..CFG };
        let limits = Limits { context: 1 << 31, batch: 1, threads: 1 };
        let MemorySizes { kv_cache, scratch, .. } = qwen2_memory_sizes(&cfg, &limits).unwrap();
        assert_eq!(kv_cache, 10_000 * 2 * ((1 << 26) * 41 + 2 * ((1 << 31) + 1)) * 64);
        let error = create_qwen2_arenas(&cfg, &limits).err().unwrap().to_string();
        assert!(
            error.starts_with(&format!("cannot allocate {} bytes of memory: ", kv_cache + scratch)),
            "{error}"
        );
        assert_eq!(error.contains("this machine has "), physical_memory().is_some(), "{error}");

        let kv = sizes(4096, 512, 2).unwrap().kv_cache;
        // Two layers and two heads: 128 panels of 41 rows for K, two of 4097 rows for V; 64 bytes a row.
        assert_eq!(kv, 2 * 2 * (128 * 41 + 2 * 4097) * 64);
    }
}
