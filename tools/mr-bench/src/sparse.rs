//! Model files of any size that take no room: valid in all that opening checks, and zeros for weights.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use mr_cli::Result;
use mrt_format::{Digest, NewSection, plan_file, sha256};
use mruntime::Qwen2Config;

const QWEN2_5_7B: Qwen2Config = Qwen2Config {
    hidden_size: 3584,
    intermediate_size: 18_944,
    num_layers: 28,
    num_heads: 28,
    num_kv_heads: 4,
    head_dim: 128,
    vocab_size: 152_064,
    max_position_embeddings: 32_768,
    rms_norm_eps: 1e-6,
    rope_theta: 1e6,
    tie_word_embeddings: false,
};

const QWEN2_5_0_5B: Qwen2Config = Qwen2Config {
    hidden_size: 896,
    intermediate_size: 4864,
    num_layers: 24,
    num_heads: 14,
    num_kv_heads: 2,
    head_dim: 64,
    vocab_size: 151_936,
    tie_word_embeddings: true,
    ..QWEN2_5_7B
};

/// Nobody's model: a tenth of a billion parameters, most of them embeddings.
const TENTH: Qwen2Config =
    Qwen2Config { hidden_size: 384, intermediate_size: 1024, num_heads: 6, ..QWEN2_5_0_5B };

/// The shape of this name.
pub fn parse_shape(name: &str) -> std::result::Result<(String, Qwen2Config), String> {
    let shape = match name {
        "0.1b" => TENTH,
        "0.5b" => QWEN2_5_0_5B,
        "7b" => QWEN2_5_7B,
        _ => return Err("0.1b, 0.5b or 7b".into()),
    };
    Ok((name.to_owned(), shape))
}

/// Writes a file of this shape with these sections; its arena is a hole.
pub fn write_sparse(file: &File, cfg: &Qwen2Config, sections: &[(String, Vec<u8>)]) -> Result<()> {
    let planned: Vec<_> =
        sections.iter().map(|(name, bytes)| NewSection { name, bytes: bytes.len() as u64 }).collect();
    let contents: Vec<_> = sections.iter().map(|(_, bytes)| bytes.as_slice()).collect();
    let plan = plan_file(cfg, &planned)?;
    let prologue = plan.prologue();
    let mut digests = vec![Digest([0; 32]); prologue.chunk_count()];
    let last = digests.len() - 1;
    digests[..last].fill(sha256(&vec![0; prologue.chunk(0).bytes as usize]));
    digests[last] = sha256(&vec![0; prologue.chunk(last).bytes as usize]);
    let (head, _) = plan.head(&contents, &digests);
    let write = || -> io::Result<()> {
        file.write_all_at(&head, 0)?;
        file.set_len(prologue.file_bytes())
    };
    write().map_err(|e| format!("a model without weights cannot be written: {e}").into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mruntime::{Model, OpenOptions, Pool, Verify};

    #[test]
    fn a_sparse_model_is_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (_, cfg) = parse_shape("0.1b").unwrap();
        write_sparse(file.as_file(), &cfg, &[("LICENSE".into(), b"none".to_vec())]).unwrap();
        let options = OpenOptions { verify: Verify::Full, ..OpenOptions::default() };
        let model = Model::open(file.path(), &options, &mut Pool::new(2).unwrap()).unwrap();
        assert_eq!(model.config(), &cfg);
        assert_eq!(*model.section("LICENSE").unwrap().unwrap(), *b"none");
        assert!(parse_shape("1b").is_err());
    }
}
