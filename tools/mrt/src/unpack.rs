//! `mrt unpack`: back to a Hugging Face directory.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use mr_cli::{FileError, INTERRUPTED, progress_bar};
use mrt_format::{
    CHAT_TEMPLATE, CONVERSION_REPORT, GENERATION, TENSOR_TABLE, TOKEN_NAMES, TOKENIZER, qwen2_source_tensors,
    report_file_name, unpack_tensor,
};
use mruntime_text::find_chat_template;
use serde_json::{Map, Value, json};

use crate::file::MrtFile;

const WEIGHTS: &str = "model.safetensors";
const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";

/// Sections that conversion makes anew from the other files.
const MADE_ANEW: [&str; 5] = [TENSOR_TABLE, GENERATION, CHAT_TEMPLATE, TOKENIZER, TOKEN_NAMES];

/// Writes the weights as FP16 safetensors and the sections as files of their names into the new directory `dir`, which
/// appears when it is complete. Returns the names of the files. Setting `interrupted` stops the work.
pub fn unpack(file: &MrtFile, dir: &Path, interrupted: &AtomicBool) -> mr_cli::Result<Vec<String>> {
    let failed = |e: io::Error| FileError::new(dir, format!("cannot be written: {e}"));
    let is_empty = || std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if dir.symlink_metadata().is_ok_and(|meta| !meta.is_dir() || !is_empty()) {
        return Err(FileError::new(dir, "exists; name a new directory").into());
    }
    let parent = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".unpack.").permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755));
    let temp = builder.tempdir_in(parent).map_err(failed)?;

    let mut names = Vec::new();
    let mut write = |name: &str, content: &[u8]| {
        names.push(name.to_owned());
        let mut file = File::create_new(temp.path().join(name))?;
        file.write_all(content)?;
        file.sync_all()
    };
    for section in file.prologue.sections() {
        if MADE_ANEW.contains(&section.name.as_str()) {
            continue;
        }
        let content = file.section(&section.name)?.unwrap_or_default();
        if section.name == WEIGHTS {
            return Err(file
                .error(format!("has a section {WEIGHTS}, which is the name of the weights"))
                .into());
        }
        // The report is that of these weights.
        let name = match section.name.as_str() {
            CONVERSION_REPORT => &report_file_name(&file.prologue.arena_digest()),
            name => name,
        };
        write(name, &content).map_err(failed)?;
    }
    if let Some(template) = loose_template(file)? {
        write(CHAT_TEMPLATE_FILE, &template).map_err(failed)?;
    }
    names.push(WEIGHTS.to_owned());
    write_weights(file, &temp.path().join(WEIGHTS), interrupted).map_err(|e| match file_error(&e) {
        Some(problem) => file.error(problem),
        None => failed(e),
    })?;
    std::fs::rename(temp.path(), dir).map_err(failed)?;
    // The directory has its name now; there is nothing left to remove.
    let _ = temp.keep();
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
    Ok(names)
}

/// The chat template, if no other file of the directory has it.
fn loose_template(file: &MrtFile) -> mr_cli::Result<Option<Vec<u8>>> {
    let Some(template) = file.section(CHAT_TEMPLATE)? else { return Ok(None) };
    let (jinja, config) = (file.section(CHAT_TEMPLATE_FILE)?, file.section("tokenizer_config.json")?);
    if jinja.as_ref().is_some_and(|jinja| *jinja != template) {
        let problem =
            format!("has two chat templates: {CHAT_TEMPLATE_FILE} is another one than {CHAT_TEMPLATE}");
        return Err(file.error(problem).into());
    }
    let found = find_chat_template(jinja.as_deref(), config.as_deref()).ok().flatten();
    Ok((found.as_ref().map(String::as_bytes) != Some(&template)).then_some(template))
}

/// Marks an error that is not one of writing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Abandoned(String);

fn file_error(error: &io::Error) -> Option<String> {
    error.get_ref()?.downcast_ref::<Abandoned>().map(|abandoned| abandoned.0.clone())
}

/// The weights in one safetensors file, in the order in which a Qwen2 checkpoint lists them.
fn write_weights(file: &MrtFile, path: &Path, interrupted: &AtomicBool) -> io::Result<()> {
    let (cfg, layout) = (file.prologue.config(), file.prologue.layout());
    let tensors = qwen2_source_tensors(cfg);
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0;
    for tensor in &tensors {
        let start = end;
        end += 2 * tensor.elements();
        let entry = json!({"dtype": "F16", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::from(header).to_string();
    // Data is aligned to 8 bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));

    let bar = progress_bar("unpacking", end);
    let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for index in 0..tensors.len() {
        let read = |offset, buf: &mut [u8]| {
            let read = file.read(file.prologue.arena_offset() + offset, buf);
            read.map_err(|e| io::Error::other(Abandoned(e.problem())))
        };
        let write = |bytes: &[u8]| {
            if interrupted.load(Ordering::Relaxed) {
                return Err(io::Error::other(Abandoned(INTERRUPTED.to_owned())));
            }
            bar.inc(bytes.len() as u64);
            out.write_all(bytes)
        };
        unpack_tensor(cfg, layout, index, read, write)?;
    }
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}
