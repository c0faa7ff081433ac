//! The weights of a Qwen2 directory: one safetensors file or a sharded set, checked against the config.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use mrt_format::{Qwen2Config, SourceDtype, SourceTensor, TensorSource, qwen2_source_tensors};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{HfError, MAX_SMALL_FILE_BYTES, read_small_file};
use crate::model::read_at;

const SINGLE_FILE: &str = "model.safetensors";
/// Which shard has which tensor.
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// The limit that the safetensors format sets itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Far more than any Qwen2 checkpoint has; a header of the largest size could list two million.
const MAX_TENSORS: usize = 1 << 16;

/// Open safetensors files with the place of every tensor that [`qwen2_source_tensors`] lists, in its order.
///
/// Data is read by pread and never mapped, so that a file cut short while it is read is an error and no signal.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
    bytes: u64,
    modified: Option<SystemTime>,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    shard: usize,
    offset: u64,
    dtype: SourceDtype,
}

/// Where a header says that a tensor is.
struct Found {
    shard: usize,
    info: TensorInfo,
    data_offset: u64,
}

impl Checkpoint {
    /// Opens the shards of `dir`, reads their headers and checks names, dtypes and shapes against `cfg`.
    pub(super) fn open(dir: &Path, cfg: &Qwen2Config) -> Result<Self, HfError> {
        let index = Index::read(dir)?;
        let mut shards = Vec::new();
        let mut found = HashMap::new();
        for name in &index.files {
            let shard = Shard::open(dir.join(name))?;
            for (tensor, info, data_offset) in shard.read_header()? {
                if index.map.as_ref().is_some_and(|map| map.get(&tensor) != Some(name)) {
                    let problem =
                        format!("has tensor {tensor:?}, which {INDEX_FILE} does not place in this file");
                    return Err(HfError::bad(&shard.path, problem));
                }
                found.insert(tensor, Found { shard: shards.len(), info, data_offset });
            }
            shards.push(shard);
        }
        for (tensor, file) in index.map.iter().flatten() {
            if !found.contains_key(tensor) {
                let problem = format!("says that tensor {tensor:?} is in {file:?}, but it is not there");
                return Err(HfError::bad(&dir.join(INDEX_FILE), problem));
            }
        }
        Self::match_tensors(dir, cfg, shards, found)
    }

    fn match_tensors(
        dir: &Path,
        cfg: &Qwen2Config,
        shards: Vec<Shard>,
        mut found: HashMap<String, Found>,
    ) -> Result<Self, HfError> {
        let expected = qwen2_source_tensors(cfg);
        let absent: Vec<_> = expected.iter().filter(|t| !found.contains_key(&t.name)).collect();
        if let Some(first) = absent.first() {
            return Err(HfError::bad(dir, missing(first, absent.len(), cfg)));
        }
        let mut places = Vec::with_capacity(expected.len());
        for tensor in &expected {
            let Some(found) = found.remove(&tensor.name) else { unreachable!("absent tensors were refused") };
            places.push(place(tensor, &found, &shards[found.shard])?);
        }
        let checkpoint = Checkpoint { shards, places };
        // Tied models are often saved with a copy of the embedding under the LM head's name.
        if cfg.tie_word_embeddings
            && let Some(head) = found.remove("lm_head.weight")
        {
            checkpoint.check_tied_copy(&expected, &head)?;
        }
        // Old transformers versions saved RoPE's frequencies, which follow from the config.
        found.retain(|name, _| !name.ends_with(".rotary_emb.inv_freq"));
        if let Some((name, extra)) = found.iter().min_by_key(|(name, _)| name.as_str()) {
            let more = others(found.len());
            let problem =
                format!("has tensor {name:?}{more}, which a Qwen2 model of this config does not have");
            return Err(HfError::bad(&checkpoint.shards[extra.shard].path, problem));
        }
        Ok(checkpoint)
    }

    /// A tied model's lm_head.weight is left out if it repeats the embedding, and refused if it does not.
    fn check_tied_copy(&self, expected: &[SourceTensor], head: &Found) -> Result<(), HfError> {
        const EMBEDDING: &str = "model.embed_tokens.weight";
        let Some(index) = expected.iter().position(|t| t.name == EMBEDDING) else {
            unreachable!("every Qwen2 model has an embedding")
        };
        let shard = &self.shards[head.shard];
        let differs = || {
            let problem = format!(
                "has a lm_head.weight that differs from {EMBEDDING}, although config.json says \
                 tie_word_embeddings: true; set it to false to keep both, or remove the tensor"
            );
            HfError::bad(&shard.path, problem)
        };
        let copy =
            place(&SourceTensor { name: "lm_head.weight".into(), ..expected[index].clone() }, head, shard)?;
        if copy.dtype != self.places[index].dtype {
            return Err(differs());
        }
        let bytes = (head.info.data_offsets.1 - head.info.data_offsets.0) as u64;
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for offset in (0..bytes).step_by(1 << 20) {
            let len = (bytes - offset).min(1 << 20) as usize;
            let both = self.read(index, offset, &mut a[..len]);
            both.and_then(|()| shard.read_at(copy.offset + offset, &mut b[..len])).map_err(HfError::Read)?;
            if a[..len] != b[..len] {
                return Err(differs());
            }
        }
        Ok(())
    }

    /// Fails if a file's size or modification time is not what it was when the checkpoint was opened: what was
    /// read is then a mixture that never was a model.
    pub fn check_unchanged(&self) -> Result<(), HfError> {
        for shard in &self.shards {
            let meta = shard.file.metadata().map_err(|e| HfError::io(&shard.path, e))?;
            if meta.len() != shard.bytes || meta.modified().ok() != shard.modified {
                return Err(HfError::bad(
                    &shard.path,
                    "changed while it was read; wait for its writer and start again",
                ));
            }
        }
        Ok(())
    }

    /// The paths of the safetensors files, by name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }
}

impl TensorSource for Checkpoint {
    fn dtype(&self, index: usize) -> SourceDtype {
        self.places[index].dtype
    }

    fn read(&self, index: usize, byte_offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let place = self.places[index];
        self.shards[place.shard].read_at(place.offset + byte_offset, buf)
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, HfError> {
        let inspect = |e| HfError::io(&path, e);
        // Opening a pipe would wait for its writer, so the kind of file is looked at first.
        if !std::fs::metadata(&path).map_err(inspect)?.is_file() {
            return Err(HfError::bad(&path, "is not a regular file"));
        }
        let file = File::open(&path).map_err(inspect)?;
        let meta = file.metadata().map_err(inspect)?;
        Ok(Shard { bytes: meta.len(), modified: meta.modified().ok(), file, path })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let with_path = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", self.path.display()));
        read_at(&self.file, offset, buf).map_err(with_path)
    }

    /// Every tensor of the header with its name and its absolute offset; all rules of the format are checked.
    fn read_header(&self) -> Result<Vec<(String, TensorInfo, u64)>, HfError> {
        let bad = |problem: String| HfError::bad(&self.path, problem);
        let read =
            |offset, buf: &mut [u8]| read_at(&self.file, offset, buf).map_err(|e| HfError::io(&self.path, e));
        if self.bytes < 8 {
            return Err(bad(format!(
                "has {} bytes, too few for a safetensors file; fetch it again",
                self.bytes
            )));
        }
        let mut length = [0; 8];
        read(0, &mut length)?;
        if &length == b"version " {
            return Err(bad("is a Git LFS pointer, not the weights; run `git lfs pull`".into()));
        }
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(bad(format!(
                "claims a header of {header_bytes} bytes, more than the format's limit of {MAX_HEADER_BYTES}; it is damaged or not a safetensors file"
            )));
        }
        if header_bytes > self.bytes - 8 {
            return Err(bad(format!(
                "claims a header of {header_bytes} bytes but has only {} bytes; it is truncated, fetch it again",
                self.bytes
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        read(8, &mut header)?;
        let (metadata, tensors) =
            parse_header(&header).map_err(|problem| bad(format!("header: {problem}")))?;

        let data_start = 8 + header_bytes;
        let claimed = metadata.data_len() as u64;
        match (self.bytes - data_start).cmp(&claimed) {
            std::cmp::Ordering::Equal => {}
            order => {
                let what = if order.is_lt() { "truncated" } else { "longer than its header says" };
                return Err(bad(format!(
                    "is {what}: it has {} bytes, its header describes {}; fetch it again",
                    self.bytes,
                    data_start.saturating_add(claimed)
                )));
            }
        }
        let place = |(name, info): (String, TensorInfo)| {
            let offset = data_start + info.data_offsets.0 as u64;
            (name, info, offset)
        };
        Ok(tensors.into_iter().map(place).collect())
    }
}

/// Parses the header's JSON keeping every entry, so that a repeated name is seen, and lets the safetensors crate
/// check that the tensors cover the data without gap or overlap and that shapes and lengths agree.
fn parse_header(header: &[u8]) -> Result<(Metadata, Vec<(String, TensorInfo)>), String> {
    if header.first() != Some(&b'{') {
        return Err("does not begin with '{'".into());
    }
    let mut json = serde_json::Deserializer::from_slice(header);
    let mut tensors = json.deserialize_map(HeaderVisitor).map_err(|e| e.to_string())?;
    json.end().map_err(|e| e.to_string())?;
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = tensors.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("tensor {:?} is listed twice", pair[0].0));
    }
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, tensors.clone()).map_err(|e| e.to_string())?;
    Ok((metadata, tensors))
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<BTreeMap<String, String>>()?;
                continue;
            }
            if tensors.len() == MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            let info = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
            tensors.push((name, info));
        }
        Ok(tensors)
    }
}

/// Which files hold the weights, and for a sharded set which tensor is where.
struct Index {
    files: Vec<String>,
    map: Option<BTreeMap<String, String>>,
}

impl Index {
    /// A single file is preferred to an index beside it, as transformers does.
    fn read(dir: &Path) -> Result<Self, HfError> {
        if dir.join(SINGLE_FILE).symlink_metadata().is_ok() {
            return Ok(Index { files: vec![SINGLE_FILE.into()], map: None });
        }
        let path = dir.join(INDEX_FILE);
        let Some(json) = read_small_file(&path, MAX_SMALL_FILE_BYTES)? else {
            let problem =
                format!("has neither {SINGLE_FILE} nor {INDEX_FILE}; the weights must be safetensors");
            return Err(HfError::bad(dir, problem));
        };
        #[derive(serde::Deserialize)]
        struct File {
            weight_map: BTreeMap<String, String>,
        }
        let index: File = serde_json::from_slice(&json)
            .map_err(|e| HfError::bad(&path, format!("is not a safetensors index: {e}")))?;
        let mut files: Vec<_> = index.weight_map.values().cloned().collect();
        files.sort();
        files.dedup();
        for file in &files {
            // A shard lies beside its index; a path that leads elsewhere is no shard of this model.
            if Path::new(file).file_name() != Some(file.as_ref()) {
                return Err(HfError::bad(
                    &path,
                    format!("names the shard {file:?}, which is not a plain file name"),
                ));
            }
            if !dir.join(file).exists() {
                return Err(HfError::bad(
                    &path,
                    format!("names the shard {file:?}, which is missing; fetch it"),
                ));
            }
        }
        Ok(Index { files, map: Some(index.weight_map) })
    }
}

fn place(tensor: &SourceTensor, found: &Found, shard: &Shard) -> Result<Place, HfError> {
    let bad = |problem| HfError::bad(&shard.path, format!("tensor {} {problem}", tensor.name));
    let dtype = match found.info.dtype {
        Dtype::BF16 => SourceDtype::Bf16,
        Dtype::F16 => SourceDtype::F16,
        Dtype::F32 => SourceDtype::F32,
        other => {
            let problem = format!("is {other:?}; BF16, F16 and F32 are supported (not quantised weights)");
            return Err(bad(problem));
        }
    };
    if found.info.shape != tensor.shape {
        let problem = format!("has shape {:?}; config.json makes it {:?}", found.info.shape, tensor.shape);
        return Err(bad(problem));
    }
    Ok(Place { shard: found.shard, offset: found.data_offset, dtype })
}

fn missing(first: &SourceTensor, count: usize, cfg: &Qwen2Config) -> String {
    let hint = match first.name.as_str() {
        "lm_head.weight" if !cfg.tie_word_embeddings => {
            "; config.json says tie_word_embeddings: false (true would use the embedding)"
        }
        name if name.ends_with("_proj.bias") => "; Qwen2 has biases on Q, K and V",
        _ => "",
    };
    format!("tensor {} {:?} is missing from the weights{}{hint}", first.name, first.shape, others(count))
}

fn others(count: usize) -> String {
    if count > 1 { format!(" (and {} others)", count - 1) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tempfile::TempDir;

    const CFG: Qwen2Config = Qwen2Config {
        hidden_size: 8,
        intermediate_size: 6,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 4,
        vocab_size: 10,
        max_position_embeddings: 16,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        tie_word_embeddings: true,
    };

    /// Header and data of a checkpoint of `CFG` in BF16, the values counting up from tensor to tensor.
    fn model() -> (Value, Vec<u8>) {
        let (mut header, mut data) = (json!({"__metadata__": {"format": "pt"}}), Vec::new());
        for tensor in qwen2_source_tensors(&CFG) {
            push(&mut header, &mut data, &tensor.name, &tensor.shape);
        }
        (header, data)
    }

    fn push(header: &mut Value, data: &mut Vec<u8>, name: &str, shape: &[usize]) {
        let start = data.len();
        data.extend((0..shape.iter().product::<usize>()).flat_map(|i| ((start + i) as u16).to_le_bytes()));
        header[name] = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]});
    }

    fn write(dir: &Path, name: &str, header: &[u8], data: &[u8]) {
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(dir.join(name), [&length, header, data].concat()).unwrap();
    }

    fn open_in(dir: &Path) -> Result<Checkpoint, String> {
        Checkpoint::open(dir, &CFG).map_err(|e| {
            let message = e.to_string();
            assert!(!message.contains('\n'), "{message}");
            message.replace(dir.to_str().unwrap(), "DIR")
        })
    }

    fn open(header: &Value, data: &[u8]) -> Result<Checkpoint, String> {
        open_raw(header.to_string().as_bytes(), data)
    }

    fn open_raw(header: &[u8], data: &[u8]) -> Result<Checkpoint, String> {
        let dir = TempDir::new().unwrap();
        write(dir.path(), SINGLE_FILE, header, data);
        open_in(dir.path())
    }

    #[test]
    fn reads_every_tensor_where_the_header_puts_it() {
        let (header, data) = model();
        let checkpoint = open(&header, &data).unwrap();
        for (i, tensor) in qwen2_source_tensors(&CFG).iter().enumerate() {
            assert_eq!(checkpoint.dtype(i), SourceDtype::Bf16);
            let offsets = &header[&tensor.name]["data_offsets"];
            let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() as usize);
            let mut bytes = vec![0; end - start - 2];
            checkpoint.read(i, 2, &mut bytes).unwrap();
            assert_eq!(bytes, data[start + 2..end], "{}", tensor.name);
        }
        checkpoint.check_unchanged().unwrap();
    }

    #[test]
    fn refuses_what_does_not_fit_the_config() {
        const Q: &str = "model.layers.0.self_attn.q_proj.weight";
        type Change = fn(&mut Value, &mut Vec<u8>);
        let table: [(Change, &str); 10] = [
            (|h, _| h[Q]["dtype"] = json!("a\n\u{1b}[2J"), "unknown variant `a??[2J`"),
            (|h, _| h[Q]["shape"] = json!([4, 16]), "has shape [4, 16]; config.json makes it [8, 8]"),
            (|h, _| h[Q]["shape"] = json!([64]), "has shape [64]; config.json makes it [8, 8]"),
            (|h, _| h[Q]["dtype"] = json!("I16"), "q_proj.weight is I16; BF16, F16 and F32 are supported"),
            (
                |h, _| h[Q]["dtype"] = json!("Q4_K"),
                "\"model.layers.0.self_attn.q_proj.weight\": unknown variant `Q4_K`",
            ),
            (rename_q, "tensor model.layers.0.self_attn.q_proj.weight [8, 8] is missing"),
            (
                |h, d| push(h, d, "model.layers.1.mlp.up_proj.weight", &[6, 8]),
                "has tensor \"model.layers.1.mlp.up_proj.weight\", which",
            ),
            (|h, d| push(h, d, "evil\n\u{1b}[2J", &[1]), "has tensor \"evil\\n\\u{1b}[2J\", which"),
            (|h, d| push(h, d, "lm_head.weight", &[10, 8]), "has a lm_head.weight that differs"),
            (|h, d| push(h, d, "lm_head.weight", &[8, 10]), "lm_head.weight has shape [8, 10]"),
        ];
        for (change, expected) in table {
            let (mut header, mut data) = model();
            change(&mut header, &mut data);
            let message = open(&header, &data).expect_err(expected);
            assert!(message.starts_with("DIR") && message.contains(expected), "{message}");
        }

        fn rename_q(header: &mut Value, _: &mut Vec<u8>) {
            let tensor = header.as_object_mut().unwrap().remove(Q).unwrap();
            header["q"] = tensor;
        }
    }

    #[test]
    fn ignores_rope_buffers_and_a_repeated_tied_embedding() {
        let (mut header, mut data) = model();
        push(&mut header, &mut data, "model.layers.0.self_attn.rotary_emb.inv_freq", &[2]);
        let offsets = &header["model.embed_tokens.weight"]["data_offsets"];
        let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() as usize);
        let copy_at = data.len();
        data.extend_from_within(start..end);
        header["lm_head.weight"] =
            json!({"dtype": "BF16", "shape": [10, 8], "data_offsets": [copy_at, data.len()]});
        open(&header, &data).unwrap();
    }

    #[test]
    fn says_what_is_often_behind_a_missing_tensor() {
        let untied = Qwen2Config { tie_word_embeddings: false, ..CFG };
        let (header, data) = model();
        let dir = TempDir::new().unwrap();
        write(dir.path(), SINGLE_FILE, header.to_string().as_bytes(), &data);
        let message = Checkpoint::open(dir.path(), &untied).unwrap_err().to_string();
        assert!(message.contains("tensor lm_head.weight [10, 8] is missing"), "{message}");
        assert!(message.contains("tie_word_embeddings: false"), "{message}");

        let mut header = header;
        header.as_object_mut().unwrap().retain(|name, _| !name.ends_with(".bias"));
        let without_biases = header.to_string();
        write(dir.path(), SINGLE_FILE, without_biases.as_bytes(), &data);
        // The biases' bytes are a gap now, which the format forbids before the config matters.
        assert!(open_in(dir.path()).unwrap_err().contains("header: invalid offset for tensor"));
    }

    #[test]
    fn refuses_headers_that_lie() {
        const NORM: &str = "model.norm.weight";
        type Change = fn(&mut Value);
        let table: [(Change, &str); 10] = [
            (|h| h[NORM]["data_offsets"][0] = json!(0), "invalid offset"),
            (|h| h[NORM]["data_offsets"] = json!([16, 0]), "invalid"),
            (
                |h| h[NORM]["data_offsets"] = json!([-16, 0]),
                "tensor \"model.norm.weight\": invalid value: integer `-16`",
            ),
            (|h| h[NORM]["data_offsets"] = json!([0, u64::MAX]), "invalid"),
            (|h| h[NORM]["shape"] = json!([9]), "invalid shape, data type, or offset"),
            (|h| h[NORM]["shape"] = json!([u64::MAX, 2]), "overflow"),
            (|h| h[NORM]["shape"] = json!([8.0]), "invalid type: floating point `8.0`"),
            (|h| h[NORM] = json!(7), "invalid type: integer `7`"),
            (|h| h["__metadata__"] = json!({"format": 1}), "invalid type: integer `1`"),
            (|h| *h = json!([]), "does not begin with '{'"),
        ];
        for (change, expected) in table {
            let (mut header, data) = model();
            change(&mut header);
            let message = open(&header, &data).expect_err(expected);
            assert!(message.starts_with("DIR/model.safetensors: header: "), "{message}");
            assert!(message.contains(expected), "{expected}: {message}");
        }
    }

    #[test]
    fn refuses_repeated_names_and_broken_json() {
        let (header, data) = model();
        let text = header.to_string();
        let again = format!("\"model.norm.weight\":{}", header["model.norm.weight"]);
        let repeated = text.replacen('{', &format!("{{{again},"), 1);
        let message = open_raw(repeated.as_bytes(), &data).unwrap_err();
        assert!(message.contains("tensor \"model.norm.weight\" is listed twice"), "{message}");

        let trailing = format!("{text}x");
        for broken in [&text[..text.len() - 1], &trailing, "", "{", "{\"\u{0}"] {
            assert!(open_raw(broken.as_bytes(), &data).unwrap_err().contains("header: "));
        }
        assert!(open_raw(b"{\"\xff\": 1}", &data).unwrap_err().contains("header: "));
        let padded = format!("{text}   ");
        open_raw(padded.as_bytes(), &data).unwrap();

        let entry = |i| format!("\"{i}\":{{\"dtype\":\"F16\",\"shape\":[0],\"data_offsets\":[0,0]}}");
        let many = format!("{{{}}}", (0..=MAX_TENSORS).map(entry).collect::<Vec<_>>().join(","));
        assert!(open_raw(many.as_bytes(), &[]).unwrap_err().contains("more than 65536 tensors"));
    }

    #[test]
    fn refuses_every_truncation_and_extension() {
        let (header, data) = model();
        let dir = TempDir::new().unwrap();
        write(dir.path(), SINGLE_FILE, header.to_string().as_bytes(), &data);
        let path = dir.path().join(SINGLE_FILE);
        let whole = std::fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(61).chain([7, 8, 9, whole.len() - 1]) {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = open_in(dir.path()).unwrap_err();
            assert!(message.contains("truncated") || message.contains("too few"), "{length}: {message}");
        }
        std::fs::write(&path, [whole.as_slice(), b"x"].concat()).unwrap();
        assert!(open_in(dir.path()).unwrap_err().contains("is longer than its header says"));
    }

    #[test]
    fn refuses_header_lengths_before_it_allocates_them() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        for (length, expected) in [
            (u64::MAX, "claims a header of 18446744073709551615 bytes"),
            (MAX_HEADER_BYTES + 1, "more than the format's limit of 100000000"),
            (MAX_HEADER_BYTES, "has only 108 bytes; it is truncated"),
            (0, "header: does not begin with '{'"),
        ] {
            std::fs::write(&path, [&length.to_le_bytes()[..], &[b'{'; 100]].concat()).unwrap();
            let message = open_in(dir.path()).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        std::fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
        assert!(open_in(dir.path()).unwrap_err().contains("git lfs pull"));
    }

    /// Splits the model's tensors over two shards and returns the index's weight map.
    fn write_shards(dir: &Path) -> serde_json::Map<String, Value> {
        let tensors = qwen2_source_tensors(&CFG);
        let mut map = serde_json::Map::new();
        for (i, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
            let (mut header, mut data) = (json!({}), Vec::new());
            let name = format!("model-{}-of-2.safetensors", i + 1);
            for tensor in part {
                push(&mut header, &mut data, &tensor.name, &tensor.shape);
                map.insert(tensor.name.clone(), json!(name));
            }
            write(dir, &name, header.to_string().as_bytes(), &data);
        }
        map
    }

    #[test]
    fn reads_shards_and_refuses_indices_that_lie() {
        type Change = fn(&mut serde_json::Map<String, Value>);
        let table: [(Change, &str); 7] = [
            (
                |m| drop(m.insert("x".into(), json!("model-1-of-2.safetensors"))),
                "says that tensor \"x\" is in \"model-1-of-2",
            ),
            (
                |m| drop(m.insert("x".into(), json!("gone.safetensors"))),
                "names the shard \"gone.safetensors\", which is missing",
            ),
            (|m| drop(m.insert("x".into(), json!("../up.safetensors"))), "which is not a plain file name"),
            (|m| drop(m.insert("x".into(), json!("/etc/passwd"))), "which is not a plain file name"),
            (|m| drop(m.insert("x".into(), json!(".."))), "which is not a plain file name"),
            (
                |m| drop(m.remove("model.norm.weight")),
                "has tensor \"model.norm.weight\", which model.safetensors.index.json",
            ),
            (|m| drop(m.insert("x".into(), json!(1))), "is not a safetensors index"),
        ];
        let dir = TempDir::new().unwrap();
        let map = write_shards(dir.path());
        let write_index = |map| {
            std::fs::write(dir.path().join(INDEX_FILE), json!({"weight_map": map}).to_string()).unwrap();
        };
        write_index(map.clone());
        open_in(dir.path()).unwrap();
        for (change, expected) in table {
            let mut map = map.clone();
            change(&mut map);
            write_index(map);
            let message = open_in(dir.path()).expect_err(expected);
            assert!(message.contains(expected), "{message}");
        }
        // A tensor in both shards: the index can mean only one of them.
        write_index(map);
        let first = std::fs::read(dir.path().join("model-1-of-2.safetensors")).unwrap();
        std::fs::write(dir.path().join("model-2-of-2.safetensors"), first).unwrap();
        assert!(open_in(dir.path()).unwrap_err().contains("does not place in this file"));
    }

    #[test]
    fn notices_files_that_change() {
        let (header, data) = model();
        let dir = TempDir::new().unwrap();
        write(dir.path(), SINGLE_FILE, header.to_string().as_bytes(), &data);
        let checkpoint = open_in(dir.path()).unwrap();
        let file = File::options().write(true).open(dir.path().join(SINGLE_FILE)).unwrap();

        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(checkpoint.check_unchanged().unwrap_err().to_string().contains("changed while it was read"));

        file.set_len(20).unwrap();
        let error = checkpoint.read(0, 0, &mut [0; 16]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("model.safetensors: there is no byte "), "{error}");
        assert!(checkpoint.check_unchanged().is_err());
    }

    #[test]
    fn says_what_is_missing_from_the_directory() {
        let dir = TempDir::new().unwrap();
        assert!(open_in(dir.path()).unwrap_err().contains("has neither model.safetensors nor"));
        std::fs::create_dir(dir.path().join(SINGLE_FILE)).unwrap();
        assert!(open_in(dir.path()).unwrap_err().contains("is not a regular file"));
    }
}
