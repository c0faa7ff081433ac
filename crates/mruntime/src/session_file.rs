//! Sessions in files: the text and its part of the KV cache, to go on later without computing it again.
//!
//! A file belongs to one model, one context size and one way to compute, and is refused by others. Little-endian:
//!
//! | offset | size | what |
//! |---|---|---|
//! | 0 | 8 | `89 4D 52 53 0D 0A 1A 0A` |
//! | 8 | 4 | version of this format, 1 |
//! | 12 | 4 | [numerics](crate::Numerics::id): 0 exact |
//! | 16 | 32 | root digest of the model's file |
//! | 48 | 8 | context: positions of the KV cache |
//! | 56 | 8 | T, tokens of the text |
//! | 64 | 8 | P, positions of the cache that are filled: T or T - 1 |
//! | 72 | 4 T | token ids |
//! | | 64 D ceil(P / 32) each | K of each layer and KV head: FP16 `[ceil(P / 32)][D = head_dim][32 positions]`, written as zeros after P |
//! | | 64 P ceil(D / 32) each | V of each layer and KV head: FP16 `[ceil(D / 32)][P][32 dimensions]`, written as zeros after D |
//! | | 32 | SHA-256 of all before |

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use mrt_format::{Digest, Sha256};
use mrt_kernels::{PANEL, f16};

use crate::error::Error;
use crate::forward::check_ids;
use crate::platform::sync_folder;
use crate::session::Session;

const MAGIC: [u8; 8] = *b"\x89MRS\r\n\x1a\n";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 72;
const DIGEST_BYTES: u64 = 32;

/// The numbers of the header.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header {
    numerics: u32,
    root: Digest,
    context: u64,
    tokens: u64,
    positions: u64,
}

impl Header {
    fn of(session: &Session<'_>, root: &Digest) -> Header {
        Header {
            numerics: session.scratch.numerics().id(),
            root: *root,
            context: session.kv.context() as u64,
            tokens: session.tokens.len() as u64,
            positions: session.kv.len() as u64,
        }
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.numerics.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.root.0);
        for (bytes, number) in
            bytes[48..].chunks_exact_mut(8).zip([self.context, self.tokens, self.positions])
        {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// The header, if its session can go on in one that has `own` as its own.
    fn parse(bytes: &[u8; HEADER_BYTES], own: &Header) -> Result<Header, String> {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..8] != MAGIC {
            return Err("not a session file".into());
        }
        if word(8) != VERSION {
            return Err(format!(
                "a session file of version {}; this program knows version {VERSION}",
                word(8)
            ));
        }
        let header = Header {
            numerics: word(12),
            root: Digest(std::array::from_fn(|i| bytes[16 + i])),
            context: number(48),
            tokens: number(56),
            positions: number(64),
        };
        let Header { root, context, tokens, positions, .. } = header;
        if root != own.root {
            return Err(format!("a session of another model, {root}; this one is {}", own.root));
        }
        if header.numerics != own.numerics {
            return Err(format!(
                "computed with numerics {}; this session has {}",
                header.numerics, own.numerics
            ));
        }
        if context != own.context {
            return Err(format!(
                "a session with a context of {context} tokens; this one has {}",
                own.context
            ));
        }
        if positions > context || tokens < positions || tokens - positions > 1 {
            return Err(format!("damaged: {tokens} tokens, {positions} positions, a context of {context}"));
        }
        Ok(header)
    }
}

impl Session<'_> {
    /// Writes the session to `path`, whole or not at all: a file that is there stays until the new one is complete.
    /// `root` is the [root digest](crate::Model::root) of the model's file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>, root: &Digest) -> Result<(), Error> {
        let path = path.as_ref();
        write_atomically(path, |file| self.write(file, root))
            .map_err(|source| Error::Io { path: path.into(), source })
    }

    /// Takes over the session that [`save`](Self::save) wrote: from here on, this one does what that one would have
    /// done, with exact numerics bit for bit. The sampler's state is not part of it.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, or is a session of another model, context size or format version. The
    /// session is then as it was; only when reading fails after the checksum has been checked, or what no session has is
    /// found (a token outside the vocabulary, a number that is not finite), it is empty.
    pub fn load(&mut self, path: impl AsRef<Path>, root: &Digest) -> Result<(), Error> {
        let path = path.as_ref();
        let io_error = |source| Error::Io { path: path.into(), source };
        let problem = |problem| Error::SessionFile { path: path.into(), problem };
        // Opening a pipe would wait for its writer, so the kind of file is looked at first.
        if !std::fs::metadata(path).map_err(io_error)?.is_file() {
            return Err(io_error(io::Error::other("not a regular file")));
        }
        let mut file = File::open(path).map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        let mut header = [0; HEADER_BYTES];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(problem("not a session file".into()));
            }
            result => result.map_err(io_error)?,
        }
        let header = Header::parse(&header, &Header::of(self, root)).map_err(problem)?;
        let (tokens, positions) = (header.tokens as usize, header.positions as usize);
        let expected =
            HEADER_BYTES as u64 + 4 * header.tokens + self.kv.pieces_bytes(positions) + DIGEST_BYTES;
        if bytes != expected {
            return Err(problem(format!("damaged: {bytes} bytes instead of {expected}")));
        }
        if !checksum_is_right(&mut file, bytes - DIGEST_BYTES).map_err(io_error)? {
            return Err(problem("damaged: its checksum is wrong".into()));
        }
        self.reset();
        file.seek(io::SeekFrom::Start(HEADER_BYTES as u64)).map_err(io_error)?;
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut read = |out: &mut [u8]| file.read_exact(out).map_err(io_error);
        self.tokens.resize(tokens, 0);
        let result = read(bytemuck::cast_slice_mut(&mut self.tokens)).and_then(|()| {
            let (k, v) = self.kv.pieces_mut(positions);
            k.chain(v).try_for_each(|piece| {
                read(bytemuck::cast_slice_mut(piece))?;
                match piece.iter().all(|x| x.is_finite()) {
                    true => Ok(()),
                    false => Err(problem("no session: not all keys and values are finite".into())),
                }
            })
        });
        // A right checksum says that nothing was damaged, not that a session was written.
        let result = result.and_then(|()| {
            check_ids(&self.cfg, &self.tokens).map_err(|error| problem(format!("no session: {error}")))
        });
        match result {
            Ok(()) => self.kv.advance(positions),
            Err(_) => self.tokens.clear(),
        }
        result
    }

    fn write(&self, file: &mut File, root: &Digest) -> io::Result<()> {
        let mut out = Hashing { out: BufWriter::with_capacity(1 << 20, file), hash: Sha256::default() };
        out.write(&Header::of(self, root).to_bytes())?;
        out.write(bytemuck::cast_slice(&self.tokens))?;
        let (k, v) = self.kv.pieces();
        let len = self.kv.len();
        let panels = len.div_ceil(PANEL);
        let mut last = Vec::new();
        for (i, piece) in k.enumerate() {
            let filled = len - i % panels * PANEL;
            if filled >= PANEL {
                out.write(bytemuck::cast_slice(piece))?;
                continue;
            }
            // What is not filled may be of a text that was cut: it is none of this file's business.
            last.clear();
            last.extend_from_slice(piece);
            last.chunks_exact_mut(PANEL).for_each(|row| row[filled..].fill(f16::ZERO));
            out.write(bytemuck::cast_slice(&last))?;
        }
        for piece in v {
            out.write(bytemuck::cast_slice(piece))?;
        }
        let Hashing { mut out, hash } = out;
        out.write_all(&hash.finish().0)?;
        out.flush()
    }
}

struct Hashing<W> {
    out: W,
    hash: Sha256,
}

impl<W: Write> Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.out.write_all(bytes)
    }
}

/// Whether the first `bytes` bytes of `file` have the digest that stands after them.
fn checksum_is_right(file: &mut File, bytes: u64) -> io::Result<bool> {
    file.seek(io::SeekFrom::Start(0))?;
    let (mut hash, mut left) = (Sha256::default(), bytes);
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let piece = &mut buffer[..left.min(1 << 20) as usize];
        file.read_exact(piece)?;
        hash.update(piece);
        left -= piece.len() as u64;
    }
    let mut digest = Digest([0; 32]);
    file.read_exact(&mut digest.0)?;
    Ok(hash.finish() == digest)
}

/// Writes a new file beside `path` with `write`, and gives it that name when it is on the disk.
fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    path.file_name().ok_or_else(|| io::Error::other("not the name of a file"))?;
    let (temporary, mut file) = loop {
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".session.{}-{number}.tmp", std::process::id()));
        match File::create_new(&temporary) {
            // Of a process that was killed, and had the same number: in a container all have.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => break (temporary, result?),
        }
    };
    let written = write(&mut file).and_then(|()| file.sync_all());
    drop(file);
    let named = written.and_then(|()| std::fs::rename(&temporary, path));
    if named.is_err() {
        // The first error counts.
        let _ = std::fs::remove_file(&temporary);
    }
    named?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_folder(folder.unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forward::tests::tokens;
    use crate::session::tests::{continuation, with_session};
    use crate::{session_feed, session_logits};
    use mrt_format::sha256;

    fn root() -> Digest {
        sha256(b"model")
    }

    /// The bytes of a session of 40 tokens, saved to `path`.
    fn saved(path: &Path) -> Vec<u8> {
        with_session(100, |mut session, pool| {
            session_feed(&mut session, &tokens(40), pool).unwrap();
            session.save(path, &root()).unwrap();
        });
        std::fs::read(path).unwrap()
    }

    #[test]
    fn a_loaded_session_continues_as_the_saved_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        for filled in [0, 1, 31, 32, 33, 64, 70] {
            let (text, expected) = with_session(100, |mut session, pool| {
                if filled > 0 {
                    session_feed(&mut session, &tokens(filled), pool).unwrap();
                    // One token that is chosen and not computed.
                    continuation(&mut session, filled % 2, pool);
                }
                session.save(&path, &root()).unwrap();
                (session.tokens().to_vec(), (filled > 0).then(|| continuation(&mut session, 10, pool)))
            });
            with_session(100, |mut session, pool| {
                // Whatever was there before must not matter.
                session_feed(&mut session, &[5; 90], pool).unwrap();
                session.load(&path, &root()).unwrap();
                assert_eq!(session.tokens(), text);
                if let Some(expected) = &expected {
                    assert!(continuation(&mut session, 10, pool) == *expected, "{filled}");
                }
            });
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "temporary files are gone");
    }

    #[test]
    fn what_a_killed_process_has_left_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let left = |number| dir.path().join(format!(".session.{}-{number}.tmp", std::process::id()));
        (0..1000).for_each(|number| std::fs::write(left(number), "").unwrap());
        let path = dir.path().join("a".repeat(250));
        with_session(100, |session, _| session.save(&path, &root()).unwrap());
        assert!(std::fs::metadata(&path).unwrap().len() > 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1001);
    }

    #[test]
    fn what_no_session_has_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        let good = saved(&path);
        with_session(100, |mut session, pool| {
            let end = good.len() - DIGEST_BYTES as usize;
            for (at, value, expected) in [
                (HEADER_BYTES + 4, &[0xff; 4][..], "no session: token 4294967295 at index 1 is outside"),
                (end - 2, &[0, 0x7e], "no session: not all keys and values are finite"),
            ] {
                let mut bytes = good.clone();
                bytes[at..][..value.len()].copy_from_slice(value);
                let digest = sha256(&bytes[..end]);
                bytes[end..].copy_from_slice(&digest.0);
                std::fs::write(&path, bytes).unwrap();
                let error = session.load(&path, &root()).unwrap_err().to_string();
                assert!(error.contains(expected), "{error}");
                assert!(session.tokens().is_empty());
                session_feed(&mut session, &tokens(3), pool).unwrap();
            }
        });
    }

    #[test]
    fn nothing_of_a_text_that_was_cut_is_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("cut"), dir.path().join("never there")];
        for (path, more) in paths.iter().zip([50, 0]) {
            with_session(100, |mut session, pool| {
                session_feed(&mut session, &tokens(40 + more), pool).unwrap();
                session.truncate(40);
                session.save(path, &root()).unwrap();
            });
        }
        assert!(std::fs::read(&paths[0]).unwrap() == std::fs::read(&paths[1]).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        let good = saved(&path);
        let refused = |context: usize, root: Digest, expected: &str| {
            with_session(context, |mut session, pool| {
                session_feed(&mut session, &[1, 2, 3], pool).unwrap();
                let logits = session_logits(&mut session, pool).unwrap().to_vec();
                let error = session.load(&path, &root).unwrap_err().to_string();
                assert_eq!(error, format!("{}: {expected}", path.display()));
                assert_eq!(session.tokens(), [1, 2, 3]);
                assert!(session_logits(&mut session, pool).unwrap() == logits);
            });
        };
        let other = sha256(b"another");
        refused(100, other, &format!("a session of another model, {}; this one is {other}", root()));
        refused(99, root(), "a session with a context of 100 tokens; this one has 99");
        let changed = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            std::fs::write(&path, bytes).unwrap();
        };
        changed(0, 0);
        refused(100, root(), "not a session file");
        changed(8, 2);
        refused(100, root(), "a session file of version 2; this program knows version 1");
        changed(12, 9);
        refused(100, root(), "computed with numerics 9; this session has 0");
        changed(64, 38);
        refused(100, root(), "damaged: 40 tokens, 38 positions, a context of 100");
        for at in [HEADER_BYTES, HEADER_BYTES + 4 * 40 + 7, good.len() - 40, good.len() - 1] {
            changed(at, good[at] ^ 1);
            refused(100, root(), "damaged: its checksum is wrong");
        }
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        refused(100, root(), &format!("damaged: {} bytes instead of {}", good.len() - 1, good.len()));
        std::fs::write(&path, &good[..20]).unwrap();
        refused(100, root(), "not a session file");
        std::fs::write(&path, b"").unwrap();
        refused(100, root(), "not a session file");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        refused(100, root(), "not a regular file");
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("folder");
        std::fs::create_dir_all(path.join("full")).unwrap();
        with_session(100, |session, _| assert!(session.save(&path, &root()).is_err()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
