//! The conversion: all threads pack, hash and write chunks of the arena; then comes the front of the file.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mr_cli::{NewFile, progress_bar};
use mrt_format::{
    CHUNK_BYTES, Counts, Digest, FilePlan, PackScratch, ReportEntry, Sha256, TensorSource, arena_digest,
    pack_arena_range, plan_file, qwen2_source_count, report_to_bytes, sha256,
};
use mruntime::hf::{FirstError, HfError, Qwen2Dir};
use mruntime::{Chunks, PerWorker, Pool};

use crate::ConvertError;
use crate::sections::{Sections, TokenizerKind, first_report};

/// A finished conversion.
#[derive(Debug)]
pub struct Converted {
    /// Length of the file.
    pub file_bytes: u64,
    /// Length of the weight arena in it.
    pub arena_bytes: u64,
    /// Its root digest, which a reader can insist on.
    pub root: Digest,
    /// SHA-256 of the whole file, as `sha256sum` shows it.
    pub sha256: Digest,
    /// What conversion did to each source tensor, in the order of `qwen2_source_tensors`.
    pub report: Vec<ReportEntry>,
    /// How the tokenizer is stored.
    pub tokenizer: TokenizerKind,
}

/// Writes `model` to `target`, which has still to be given its name, with a line on its `origin`. Setting `interrupted`
/// stops the work between two chunks.
///
/// Memory: 5 MB a thread and the sections (tokenizer and the like), whatever the size of the weights.
///
/// # Errors
/// Whatever stops the conversion.
pub fn convert(
    model: &Qwen2Dir,
    target: &NewFile,
    origin: Option<&str>,
    pool: &mut Pool,
    interrupted: &AtomicBool,
) -> Result<Converted, ConvertError> {
    let no_counts = vec![Counts::default(); qwen2_source_count(&model.config)];
    let report_bytes = report_to_bytes(&report(model, &no_counts)).len();
    let mut sections = Sections::collect(model, origin, report_bytes)?;
    let plan = plan_file(&model.config, &sections.planned())?;
    let file_bytes = plan.prologue().file_bytes();
    reserve(target, file_bytes)?;

    let (chunks, counts) = write_arena(model, &plan, target, pool, interrupted)?;
    model.weights.check_unchanged()?;

    let report = first_report(model, &arena_digest(&chunks))?.unwrap_or_else(|| report(model, &counts));
    sections.set_report(report_to_bytes(&report));
    let (head, root) = plan.head(&sections.contents(), &chunks);
    target.file().write_all_at(&head, 0).map_err(|e| target.error(e))?;

    // The file's own digest cannot begin before its first bytes are known, and those hold the chunks' digests.
    // Syncing waits for the disk and hashing for the processor, so that both take the time of one.
    let (synced, sha256) = thread::scope(|scope| {
        let synced = scope.spawn(|| target.file().sync_all());
        let sha256 = hash_file(target, file_bytes, interrupted);
        (synced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), sha256)
    });
    synced.map_err(|e| target.error(e))?;
    let sha256 = sha256?;
    let arena_bytes = plan.prologue().layout().arena_bytes;
    Ok(Converted { file_bytes, arena_bytes, root, sha256, report, tokenizer: sections.tokenizer })
}

/// The report's entries.
fn report(model: &Qwen2Dir, counts: &[Counts]) -> Vec<ReportEntry> {
    let entry = |(index, &counts)| ReportEntry { dtype: model.weights.dtype(index), counts };
    counts.iter().enumerate().map(entry).collect()
}

/// Reserves the whole file, so that a disk without room for it is noticed before the work.
fn reserve(target: &NewFile, bytes: u64) -> Result<(), ConvertError> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        let reserve = || fallocate(target.file(), FallocateFlags::empty(), 0, bytes);
        match rustix::io::retry_on_intr(reserve) {
            Ok(()) => return Ok(()),
            // File systems that cannot reserve find out while writing.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            Err(e) => return Err(target.no_room(bytes, e.into()).into()),
        }
    }
    Ok(target.file().set_len(bytes).map_err(|e| target.no_room(bytes, e))?)
}

/// What a worker keeps from chunk to chunk.
struct Worker {
    chunk: Vec<u8>,
    scratch: PackScratch,
    counts: Vec<Counts>,
}

/// Packs every chunk of the arena into a buffer, hashes it and writes it where it belongs. The pieces are large and
/// aligned, so that file systems that can do so keep them in large folios, which map by huge pages.
fn write_arena(
    model: &Qwen2Dir,
    plan: &FilePlan,
    target: &NewFile,
    pool: &mut Pool,
    interrupted: &AtomicBool,
) -> Result<(Vec<Digest>, Vec<Counts>), ConvertError> {
    let (cfg, prologue) = (&model.config, plan.prologue());
    let source_count = qwen2_source_count(cfg);
    let new_worker = || Worker {
        chunk: vec![0; CHUNK_BYTES as usize],
        scratch: PackScratch::new(),
        counts: vec![Counts::default(); source_count],
    };
    let mut workers: Vec<_> = (0..pool.threads()).map(|_| new_worker()).collect();
    let mut digests = vec![Digest([0; 32]); prologue.chunk_count()];
    let bar = progress_bar("packing", prologue.layout().arena_bytes);
    let error = FirstError::new();

    pool.run_split(
        (Chunks::new(&mut digests, 1), PerWorker::new(&mut workers, 1)),
        |_, i, (digest, worker)| {
            error.attempt(i, || {
                if interrupted.load(Ordering::Relaxed) {
                    return Err(ConvertError::Interrupted);
                }
                let Worker { chunk, scratch, counts } = &mut worker[0];
                let span = prologue.chunk(i);
                let chunk = &mut chunk[..span.bytes as usize];
                pack_arena_range(cfg, prologue.layout(), &model.weights, span.offset, chunk, counts, scratch)
                    .map_err(HfError::from)?;
                digest[0] = sha256(chunk);
                let offset = prologue.arena_offset() + span.offset;
                target.file().write_all_at(chunk, offset).map_err(|e| target.error(e))?;
                bar.inc(span.bytes);
                Ok(())
            });
        },
    );
    error.into_result()?;

    let mut counts = vec![Counts::default(); source_count];
    for worker in &workers {
        for (sum, &part) in counts.iter_mut().zip(&worker.counts) {
            *sum += part;
        }
    }
    Ok((digests, counts))
}

/// Bytes that are read back at a time: they stay in the second-level cache until they are hashed.
const PIECE: usize = 256 << 10;

/// SHA-256 of the whole file, read back from the page cache.
fn hash_file(target: &NewFile, bytes: u64, interrupted: &AtomicBool) -> Result<Digest, ConvertError> {
    let bar = progress_bar("hashing", bytes);
    let mut hasher = Sha256::default();
    let mut buffer = vec![0; PIECE];
    for offset in (0..bytes).step_by(buffer.len()) {
        if interrupted.load(Ordering::Relaxed) {
            return Err(ConvertError::Interrupted);
        }
        let part = &mut buffer[..(bytes - offset).min(PIECE as u64) as usize];
        target.file().read_exact_at(part, offset).map_err(|e| target.error(e))?;
        hasher.update(part);
        bar.inc(part.len() as u64);
    }
    Ok(hasher.finish())
}
