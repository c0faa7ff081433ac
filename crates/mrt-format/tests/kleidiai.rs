//! Our panels are those of KleidiAI's `f16p32x1b` packing, byte for byte.
//!
//! The digests below were computed from what KleidiAI's own routines wrote (commit 495f652, built for Arm64, run under
//! qemu): `kai_run_rhs_pack_nxk_x16p32x1bx16_x16_x16_neon` with `weight[n][k]`, and, with the transposed matrix,
//! `kai_run_rhs_pack_kxn_x16p32x1b_x16_x16_neon`; the two agreed. Products without biases were packed with zero
//! biases. A digest covers the real lanes, in order: of a last, partial panel KleidiAI leaves the spare lanes
//! unspecified, and we write zeros.
//!
//! Elements are FP16 bits from SplitMix64 with seed 0: element `i`, counted through all source tensors in their order, is
//! the upper 16 bits of output `i`, bit 14 cleared, so that it is finite.

use std::io;

use mrt_format::{
    Counts, PANEL, PackScratch, Qwen2Config, SourceDtype, TensorKind, TensorSource, pack_arena_range,
    qwen2_source_count, qwen2_source_tensors, qwen2_weights_layout, sha256,
};

/// Name of a packed matrix, K, N, SHA-256 of its real lanes.
type Packed = (&'static str, usize, usize, &'static str);

const CASES: [(Qwen2Config, [Packed; 7]); 3] = [
    (
        config(1, 33, 2, 1, 8, 70),
        [
            ("embedding", 1, 70, "54299721b5f9396f5204c844a872189a05e50900e23b996a995443d418f09865"),
            ("layers.0.qkv", 1, 32, "ac31963cd69afa4aefdeacdef344491f6eb9823b2725122775db736de6524f27"),
            ("layers.0.attn_out", 16, 1, "7ad73537169aa2e15e8ad86e865dafdea4b698433c97a04c6a50dcc1e2b0b295"),
            (
                "layers.0.gate_up, gate",
                1,
                33,
                "cdb569fd3730917fdb4d357d2bdcde5b7615839b7117563caa6a963ca6d12a3c",
            ),
            (
                "layers.0.gate_up, up",
                1,
                33,
                "b9e0e6d89f36bf12790e379701a4340baa29da91ddb8d590d154389abe6a00cf",
            ),
            ("layers.0.down", 33, 1, "bcd7e8b3c992af5b80b846ed109929a435b05bda06ee49f2b1b63f15e88fc854"),
            ("lm_head", 1, 70, "d956bcc66897a89b1c5e0361047a248e896f9970c4299f8b7e0130a3f50ed6ef"),
        ],
    ),
    (
        config(37, 64, 3, 1, 10, 96),
        [
            ("embedding", 37, 96, "0f832f691e1330968685c6e7c92400f41c397bd10b4cad38cee9b2c90c6eede5"),
            ("layers.0.qkv", 37, 50, "97fb10bdff52e66f784cb43e5668af6a8f8817bb9f87cac586215cd201afb971"),
            ("layers.0.attn_out", 30, 37, "dc93333b7166c0923d55d326b445ee64e4b05a6f1761c002d2feb1a8c10020f5"),
            (
                "layers.0.gate_up, gate",
                37,
                64,
                "796ebeea93d24b35d50b88322c0c9f922eb3ddafb3bffa3952eaed832fddeb87",
            ),
            (
                "layers.0.gate_up, up",
                37,
                64,
                "896ebe4cc81f99b51eb4a19893c452b3864ff07473149b534899fb80248e888e",
            ),
            ("layers.0.down", 64, 37, "12eda941ad5e06d37a5bf6fe0f1c4d864b6881a1084d3fd1fe906f2e245354be"),
            ("lm_head", 37, 96, "9b9165e8b9bfa69b1fc12eb8566803c75673f6d932d00e6882ea10db5198cca1"),
        ],
    ),
    (
        config(64, 129, 4, 2, 16, 33),
        [
            ("embedding", 64, 33, "b7fc037886e67ffe999d95cccec3884ca7e1d211c1ee6d3b1481cae7899de6cc"),
            ("layers.0.qkv", 64, 128, "9c00285c462f14c7c157ba137873593cce8973a25eb5fb08725c25a1d3bb1cf9"),
            ("layers.0.attn_out", 64, 64, "dd1d97d19c544b99baa2402e519cb77cfcde69c407257d24e9a9caafc8039904"),
            (
                "layers.0.gate_up, gate",
                64,
                129,
                "3622f794425800a4b6ec27c3a94176db2176b3af999751918b5c3b603ec7ee6a",
            ),
            (
                "layers.0.gate_up, up",
                64,
                129,
                "fad7f0de51fd726d23e6c0104e8194c4897e62c5a43800e2f1104c0c202d9b6a",
            ),
            ("layers.0.down", 129, 64, "c048b342b81bacd0b158c676a2cd44ec7eafadc253cc42efc9be3c385f5e6ec4"),
            ("lm_head", 64, 33, "ec1837160cbd53180b819fa1ba20c50793d3d61e3deb2ca380bc77e043cf056e"),
        ],
    ),
];

const fn config(
    hidden_size: u32,
    intermediate_size: u32,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    vocab_size: u32,
) -> Qwen2Config {
    Qwen2Config {
        hidden_size,
        intermediate_size,
        num_layers: 1,
        num_heads,
        num_kv_heads,
        head_dim,
        vocab_size,
        max_position_embeddings: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: false,
    }
}

fn splitmix64(i: u64) -> u64 {
    let z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The number of each tensor's first element.
struct RandomSource(Vec<u64>);

impl TensorSource for RandomSource {
    fn dtype(&self, _index: usize) -> SourceDtype {
        SourceDtype::F16
    }

    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let first = self.0[index] + byte_offset / 2;
        for (i, bytes) in (first..).zip(buf.as_chunks_mut().0) {
            *bytes = ((splitmix64(i) >> 48) as u16 & 0xbfff).to_le_bytes();
        }
        Ok(())
    }
}

/// The lanes below `n` of each row of each panel; all others must be zero.
fn real_lanes<'a>(panels: impl Iterator<Item = &'a [u8]>, n: usize) -> Vec<u8> {
    let mut lanes = Vec::new();
    for (p, panel) in panels.enumerate() {
        for row in panel.chunks_exact(2 * PANEL) {
            let (real, spare) = row.split_at(2 * PANEL.min(n - p * PANEL));
            lanes.extend_from_slice(real);
            assert!(spare.iter().all(|&byte| byte == 0));
        }
    }
    lanes
}

#[test]
fn panels_are_what_kleidiai_packs() {
    for (cfg, want) in CASES {
        let mut end = 0;
        let first = qwen2_source_tensors(&cfg).into_iter().map(|tensor| {
            end += tensor.elements();
            end - tensor.elements()
        });
        let source = RandomSource(first.collect());
        let layout = qwen2_weights_layout(&cfg);
        let mut arena = vec![0xff; layout.arena_bytes as usize];
        let mut counts = vec![Counts::default(); qwen2_source_count(&cfg)];
        pack_arena_range(&cfg, &layout, &source, 0, &mut arena, &mut counts, &mut PackScratch::new())
            .unwrap();

        let mut got = Vec::new();
        for tensor in layout.tensors(&cfg) {
            let (k, n) = (tensor.k as usize, tensor.n as usize);
            let bytes = &arena[tensor.span.offset as usize..][..tensor.span.bytes as usize];
            let panels = bytes.chunks_exact(2 * PANEL * (k + 1));
            let mut packed = |name, lanes: Vec<u8>| got.push((name, k, n, sha256(&lanes).to_string()));
            match tensor.kind {
                TensorKind::Vector => {}
                TensorKind::Panels => packed(tensor.name(), real_lanes(panels, n)),
                TensorKind::PanelPairs => {
                    packed(tensor.name() + ", gate", real_lanes(panels.clone().step_by(2), n));
                    packed(tensor.name() + ", up", real_lanes(panels.skip(1).step_by(2), n));
                }
            }
        }
        let want = want.map(|(name, k, n, digest)| (name.to_owned(), k, n, digest.to_owned()));
        assert_eq!(got, want);
    }
}
