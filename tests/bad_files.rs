//! Files as `mr-convert` writes them, then truncated, extended, damaged or replaced: `Model::open` says what is wrong.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions as FileOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use mruntime::{Backing, Error, FormatError, Model, OpenOptions, Pool, Verify};
use mruntime_tests::{Run, TinyModel, bits, logits};
use tempfile::TempDir;

fn options(backing: Backing, verify: Verify) -> OpenOptions {
    OpenOptions { backing, verify, ..OpenOptions::default() }
}

fn open(path: &Path, options: &OpenOptions) -> Result<Model, Error> {
    Model::open(path, options, &mut Pool::new(2).unwrap())
}

/// What is wrong with the file, of which the error must name the path.
fn problem(path: &Path, options: &OpenOptions) -> FormatError {
    let error = open(path, options).err().expect("the file is refused");
    let text = error.to_string();
    assert!(text.starts_with(&path.display().to_string()) && text.lines().count() == 1, "{text}");
    match error {
        Error::Format { problem, .. } => problem,
        Error::Damaged { mut problems, .. } if problems.len() == 1 => problems.remove(0),
        error => panic!("{error}"),
    }
}

/// A converted tiny model in a folder of its own, whose bytes can be changed and are put back.
struct Damage {
    dir: TempDir,
    file: File,
    good: Vec<u8>,
}

impl Damage {
    fn new() -> Damage {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.mrt");
        TinyModel::named("tied").convert(&path, 2);
        let file = FileOptions::new().read(true).write(true).open(&path).unwrap();
        Damage { good: std::fs::read(path).unwrap(), dir, file }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("model.mrt")
    }

    /// What is wrong when byte `at` is changed in the bits of `mask`.
    fn with_byte(&self, at: usize, mask: u8, options: &OpenOptions) -> FormatError {
        self.file.write_all_at(&[self.good[at] ^ mask], at as u64).unwrap();
        let problem = problem(&self.path(), options);
        self.file.write_all_at(&self.good[at..=at], at as u64).unwrap();
        problem
    }
}

#[test]
fn every_damaged_byte_of_the_front_is_refused_at_every_open() {
    let damage = Damage::new();
    let quick = options(Backing::Map, Verify::Header);
    let model = open(&damage.path(), &quick).unwrap();
    let front = model.prologue().sections()[0].offset as usize;
    assert!(front > 512 + 96 + 32);
    for at in 0..front {
        for mask in [0x01, 0x80] {
            let problem = damage.with_byte(at, mask, &quick);
            use FormatError::*;
            // Most of what can be wrong is found by the root digest; what must be known before it can be computed
            // has an error of its own.
            let as_specified = match at {
                0..8 => matches!(problem, BadMagic { .. }),
                8..10 => matches!(problem, UnsupportedVersion { .. }),
                12..16 => matches!(problem, BadHeaderBytes { .. }),
                16..24 => matches!(problem, UnsupportedFeatures { .. }),
                32..40 => matches!(problem, Truncated { .. } | Overlong { .. }),
                48..56 => {
                    matches!(
                        problem,
                        RootMismatch { .. } | PrologueTooLarge { .. } | PrologueOutsideFile { .. }
                    )
                }
                56..60 => matches!(problem, RootMismatch { .. } | TooManySections { .. }),
                60..64 => matches!(problem, BadChunkBytes { .. }),
                _ => matches!(problem, RootMismatch { .. }),
            };
            assert!(as_specified, "byte {at}: {problem}");
        }
    }
    assert!(open(&damage.path(), &quick).is_ok(), "all bytes are back");
}

#[test]
fn every_damaged_byte_behind_it_is_found_and_named() {
    let damage = Damage::new();
    let model = open(&damage.path(), &options(Backing::Map, Verify::Header)).unwrap();
    for backing in [Backing::Map, Backing::Read] {
        let full = options(backing, Verify::Full);
        for section in model.prologue().sections() {
            let (start, end) = (section.offset as usize, (section.offset + section.bytes) as usize);
            for at in (start..end).step_by(13).chain([end - 1]) {
                match damage.with_byte(at, 1 << (at % 8), &full) {
                    FormatError::SectionDamaged { name, .. } => assert_eq!(name, section.name),
                    problem => panic!("byte {at}: {problem}"),
                }
            }
        }
        for (offset, bytes) in model.prologue().padding().filter(|&(_, bytes)| bytes > 0) {
            for at in [offset, offset + bytes - 1] {
                let problem = damage.with_byte(at as usize, 4, &full);
                assert_eq!(problem, FormatError::PaddingNotZero { offset: at });
            }
        }
        let (start, end) = (model.prologue().arena_offset() as usize, damage.good.len());
        for at in (start..end).step_by(9973).chain([end - 1]) {
            match damage.with_byte(at, 1 << (at % 8), &full) {
                FormatError::ChunkDamaged { index, .. } => assert_eq!(index, 0),
                problem => panic!("byte {at}: {problem}"),
            }
        }
        assert!(open(&damage.path(), &full).is_ok(), "all bytes are back");
    }
}

#[test]
fn another_length_is_refused() {
    let damage = Damage::new();
    let expected = damage.good.len() as u64;
    let lengths = [1, 7, 8, 100, 511, 512, 513, 700, 4096, 2 << 20, expected - 4096, expected - 1];
    for backing in [Backing::Map, Backing::Read] {
        let quick = options(backing, Verify::Header);
        for actual in lengths {
            damage.file.set_len(actual).unwrap();
            let problem = problem(&damage.path(), &quick);
            match actual {
                0..8 => assert!(matches!(problem, FormatError::BadMagic { .. }), "{problem}"),
                8..512 => assert_eq!(problem, FormatError::HeaderTruncated { actual }),
                _ => assert_eq!(problem, FormatError::Truncated { actual, expected }),
            }
            damage.file.write_all_at(&damage.good, 0).unwrap();
        }
        for more in [1, 4096, 1 << 30] {
            damage.file.set_len(expected + more).unwrap();
            let actual = expected + more;
            assert_eq!(problem(&damage.path(), &quick), FormatError::Overlong { actual, expected });
            damage.file.set_len(expected).unwrap();
        }
    }
}

#[test]
fn an_open_model_survives_the_replacement_of_its_file() {
    let (old, new) = (TinyModel::named("tied"), TinyModel::named("untied"));
    for backing in [Backing::Map, Backing::Read] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.mrt");
        let old_root = old.convert(&path, 2).root;
        let model = open(&path, &options(backing, Verify::Header)).unwrap();
        let run = || bits(&logits(model.config(), model.arena(), &old.prompts[1].ids, Run::usual()));
        let before = run();

        let new_root = new.convert(&path, 2).root;
        assert!(run() == before);
        // Who knows the root of the file that should be there notices; who does not gets the new one.
        let pinned = OpenOptions { expected_root: Some(old_root), ..OpenOptions::default() };
        let expected = FormatError::UnexpectedRoot { found: new_root, expected: old_root };
        assert_eq!(problem(&path, &pinned), expected);
        assert_eq!(open(&path, &OpenOptions::default()).unwrap().root(), &new_root);
    }
}

#[test]
fn a_model_in_memory_survives_the_truncation_of_its_file() {
    let damage = Damage::new();
    let model = open(&damage.path(), &options(Backing::Read, Verify::Full)).unwrap();
    let tokens = &TinyModel::named("tied").prompts[1].ids;
    let run = || bits(&logits(model.config(), model.arena(), tokens, Run::usual()));
    let before = run();
    damage.file.set_len(0).unwrap();
    assert!(run() == before);
    model.verify(&mut Pool::new(1).unwrap()).expect_err("its sections are gone");
}
