//! Hugging Face Qwen2 directories: config, generation defaults, weights and the small files beside them.
//!
//! `mr-convert` and [`qwen2_load_weights`] read through this module, so that a model loaded straight from
//! safetensors is byte for byte the one that a converted file maps.

mod checkpoint;
mod config;
mod first_error;
mod generation;
mod side_files;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use mrt_format::{
    Counts, GenerationDefaults, PackError, PackScratch, Qwen2Config, pack_arena_range, qwen2_source_count,
    qwen2_weights_layout,
};

use crate::arena::Arena;
use crate::error::Error;
use crate::pool::{Chunks, PerWorker, Pool};

pub use checkpoint::Checkpoint;
pub use first_error::FirstError;
pub use side_files::SideFile;

/// Bytes of the arena that are packed at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// Larger files beside the weights are refused: the largest tokenizers have some 30 MB.
const MAX_SMALL_FILE_BYTES: u64 = 64 << 20;

/// Longest text of a problem. The longest that quote nothing have some 200 characters.
const MAX_PROBLEM_CHARS: usize = 500;

/// A Qwen2 directory, opened and checked; the weights are still in their files.
#[derive(Debug)]
pub struct Qwen2Dir {
    /// The directory.
    pub path: PathBuf,
    /// The model's shape and constants, from config.json.
    pub config: Qwen2Config,
    /// Sampling defaults and stop tokens, from generation_config.json and config.json.
    pub generation: GenerationDefaults,
    /// config.json, tokenizer, chat template and licence files, as they are.
    pub files: Vec<SideFile>,
    /// The licence that the front matter of README.md names, for example `apache-2.0`.
    pub licence: Option<String>,
    /// The weights.
    pub weights: Checkpoint,
}

impl Qwen2Dir {
    /// Opens the model in `dir`: plain files or the links of a hub cache snapshot.
    ///
    /// # Errors
    /// One line that names the file, the field or tensor, what is wrong with it and what is supported.
    pub fn open(dir: &Path) -> Result<Self, HfError> {
        if !std::fs::metadata(dir).map_err(|e| HfError::io(dir, e))?.is_dir() {
            return Err(HfError::bad(dir, "is not a directory; name the directory that holds config.json"));
        }
        let files = side_files::read(dir)?;
        let find = |name| files.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice());
        let config_path = dir.join("config.json");
        let Some(config_json) = find("config.json") else {
            return Err(HfError::bad(&config_path, "is missing; name the directory of a Hugging Face model"));
        };
        let config = config::parse(&config_path, config_json)?;
        let generation = generation::parse(dir, config_json, find("generation_config.json"), &config)?;
        let licence = side_files::licence(dir)?;
        let weights = Checkpoint::open(dir, &config)?;
        Ok(Qwen2Dir { path: dir.into(), config, generation, files, licence, weights })
    }

    /// Every file that was read, the README, and the index of shards, there or not.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let names = self.files.iter().map(|file| file.name.as_str());
        let names = names.chain([checkpoint::INDEX_FILE, side_files::README]);
        self.weights.files().map(Path::to_owned).chain(names.map(|name| self.path.join(name)))
    }

    /// The bytes of the side file `name`, if the directory has it.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|f| f.name == name).map(|f| f.bytes.as_slice())
    }
}

/// Packs the weights of `model` into an anonymous arena, which then holds what a converted file's arena holds.
///
/// # Errors
/// A file that cannot be read or that changed meanwhile, a value that FP16 cannot hold, or too little memory.
pub fn qwen2_load_weights(model: &Qwen2Dir, pool: &mut Pool) -> Result<Arena, HfError> {
    let cfg = &model.config;
    let layout = qwen2_weights_layout(cfg);
    let mut arena = Arena::new(layout.arena_bytes)?;
    let new_worker = || (PackScratch::new(), vec![Counts::default(); qwen2_source_count(cfg)]);
    let mut workers: Vec<_> = (0..pool.threads()).map(|_| new_worker()).collect();
    let error = FirstError::new();
    let parts = (Chunks::new(arena.bytes_mut(), CHUNK_BYTES), PerWorker::new(&mut workers, 1));
    pool.run_split(parts, |_, i, (out, worker)| {
        let (scratch, counts) = &mut worker[0];
        let offset = (i * CHUNK_BYTES) as u64;
        error.attempt(i, || pack_arena_range(cfg, &layout, &model.weights, offset, out, counts, scratch));
    });
    error.into_result()?;
    model.weights.check_unchanged()?;
    Ok(arena)
}

/// Why a Hugging Face directory cannot be used; its text is one line.
#[derive(Debug, thiserror::Error)]
pub enum HfError {
    /// The operating system refused to open or read a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The weights cannot be read; the error names the file.
    #[error("{0}")]
    Read(io::Error),
    /// A file does not say what it must.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A tensor that cannot be read or that FP16 cannot hold.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// No memory for the arena.
    #[error(transparent)]
    Runtime(#[from] Error),
}

impl HfError {
    fn io(path: &Path, source: io::Error) -> Self {
        HfError::Io { path: path.into(), source }
    }

    fn bad(path: &Path, problem: impl Into<String>) -> Self {
        HfError::Invalid { path: path.into(), problem: quotable(&problem.into()) }
    }
}

/// What is wrong may quote what the file says: no control characters of it, and no more than fits on a screen.
fn quotable(problem: &str) -> String {
    let clean = |c: char| if c.is_control() { '?' } else { c };
    let mut text: String = problem.chars().take(MAX_PROBLEM_CHARS).map(clean).collect();
    if problem.chars().nth(MAX_PROBLEM_CHARS).is_some() {
        text.push_str("...");
    }
    text
}

/// The whole of a regular file of at most `limit` bytes; `None` if there is none of this name.
fn read_small_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, HfError> {
    let meta = match std::fs::metadata(path) {
        // Of the cache of the hub, whose models are links, who copies one may copy the links only.
        Err(e) if e.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err(HfError::bad(
                path,
                "is a link to a file that is not there; copy the model with cp -L",
            ));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        meta => meta.map_err(|e| HfError::io(path, e))?,
    };
    // Opening a pipe would wait for its writer, so the kind of file is looked at first.
    if !meta.is_file() {
        return Err(HfError::bad(path, "is not a regular file"));
    }
    let file = File::open(path).map_err(|e| HfError::io(path, e))?;
    let mut bytes = Vec::with_capacity(meta.len().min(limit) as usize);
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| HfError::io(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(HfError::bad(path, format!("is larger than the limit of {} MiB", limit >> 20)));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use mrt_format::{SourceDtype, TensorSource, qwen2_source_tensors};

    fn tiny(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/tiny").join(name)
    }

    #[test]
    fn opens_directories_of_every_kind() {
        for (name, dtype) in [
            ("tied", SourceDtype::Bf16),
            ("untied", SourceDtype::Bf16),
            ("gqa7_head_dim", SourceDtype::Bf16),
            ("sharded3", SourceDtype::Bf16),
            ("store_f16", SourceDtype::F16),
            ("store_f32", SourceDtype::F32),
        ] {
            let model = Qwen2Dir::open(&tiny(name)).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(model.weights.dtype(0), dtype, "{name}");
            assert_eq!(model.config.tie_word_embeddings, !matches!(name, "untied" | "sharded3"), "{name}");
            assert_eq!(model.generation.stop_tokens, [319, 317], "{name}");
            let names: Vec<_> = model.files.iter().map(|f| f.name.as_str()).collect();
            assert_eq!(names, ["config.json", "generation_config.json"], "{name}");
            assert_eq!(model.licence, None);
        }
    }

    #[test]
    fn the_arena_holds_the_weights_with_any_number_of_threads() {
        let model = Qwen2Dir::open(&tiny("untied")).unwrap();
        let one = qwen2_load_weights(&model, &mut Pool::new(1).unwrap()).unwrap();
        let three = qwen2_load_weights(&model, &mut Pool::new(3).unwrap()).unwrap();
        assert!(one.bytes() == three.bytes());

        // The second token's embedding is column 1 of the first panel: one value in each row of 64 bytes.
        let embedding = qwen2_source_tensors(&model.config)[0].clone();
        assert_eq!(embedding.name, "model.embed_tokens.weight");
        let mut row = vec![0; 2 * embedding.shape[1]];
        model.weights.read(0, row.len() as u64, &mut row).unwrap();
        for (k, value) in row.as_chunks().0.iter().enumerate() {
            let expected = half::f16::from_f32(half::bf16::from_le_bytes(*value).to_f32());
            assert_eq!(one.bytes()[64 * (k + 1) + 2..][..2], expected.to_le_bytes(), "{k}");
        }
    }

    #[test]
    fn a_value_beyond_fp16_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny("tied").join(file), dir.path().join(file)).unwrap();
        }
        let weights = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&weights).unwrap();
        // The last tensor of the file is model.norm.weight, and its last element becomes 2^127.
        let end = bytes.len();
        bytes[end - 2..].copy_from_slice(&half::bf16::from_f32(1.7014118e38).to_le_bytes());
        std::fs::write(&weights, bytes).unwrap();
        let model = Qwen2Dir::open(dir.path()).unwrap();
        for threads in [1, 2] {
            let error =
                qwen2_load_weights(&model, &mut Pool::new(threads).unwrap()).err().unwrap().to_string();
            assert!(error.starts_with("model.norm.weight[63] is 170141"), "{error}");
        }
    }

    #[test]
    fn says_what_is_wrong_with_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| Qwen2Dir::open(path).unwrap_err().to_string();
        assert!(open(&dir.path().join("gone")).contains("gone: No such file or directory"));
        assert!(open(dir.path()).contains("config.json: is missing"));
        let config = dir.path().join("config.json");
        std::fs::write(&config, "{}").unwrap();
        assert!(open(&config).contains("is not a directory"));
        #[cfg(unix)]
        for (file, problem) in [
            ("generation_config.json", "generation_config.json: is a link to a file that is not there"),
            ("model.safetensors", "model.safetensors: No such file"),
        ] {
            let link = dir.path().join(file);
            std::os::unix::fs::symlink("../blobs/1234", &link).unwrap();
            std::fs::copy(tiny("tied").join("config.json"), &config).unwrap();
            let error = open(dir.path());
            assert!(error.contains(problem), "{error}");
            std::fs::remove_file(link).unwrap();
            std::fs::write(&config, "{}").unwrap();
        }
        for i in 0..17 {
            std::fs::write(dir.path().join(format!("LICENSE-{i}")), "").unwrap();
        }
        assert!(open(dir.path()).contains("has 17 files LICENSE* and NOTICE*; keep at most 16"));
        (0..17).for_each(|i| std::fs::remove_file(dir.path().join(format!("LICENSE-{i}"))).unwrap());
        std::fs::write(dir.path().join("tokenizer.json"), "version https://git-lfs.github.com/spec/v1\n")
            .unwrap();
        assert!(open(dir.path()).contains("tokenizer.json: is a Git LFS pointer"));
        std::fs::write(dir.path().join("tokenizer.json"), "{\"a\"").unwrap();
        assert!(open(dir.path()).contains("tokenizer.json: is not JSON"));
        let huge = File::create(dir.path().join("merges.txt")).unwrap();
        huge.set_len(MAX_SMALL_FILE_BYTES + 1).unwrap();
        std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
        assert!(open(dir.path()).contains("merges.txt: is larger than the limit of 64 MiB"));
    }
}
