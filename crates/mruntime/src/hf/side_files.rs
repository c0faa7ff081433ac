//! The small files of a model directory that go into a `.mrt` file as they are.

use std::path::Path;

use serde::de::IgnoredAny;

use super::{HfError, MAX_SMALL_FILE_BYTES, read_small_file};

/// The model card.
pub(super) const README: &str = "README.md";

const NAMES: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Those that grow with the vocabulary.
const LARGE_NAMES: [&str; 3] = ["tokenizer.json", "vocab.json", "merges.txt"];

/// The most bytes of the others, which are read into trees of many times their size.
const MAX_USUAL_BYTES: u64 = 4 << 20;

/// Licences ask to be passed on with the work, and Apache-2.0 asks the same for its notices.
const LICENCE_PREFIXES: [&str; 2] = ["LICENSE", "NOTICE"];

const MAX_LICENCES: usize = 16;

/// A file of the model directory with its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// File name, without directory.
    pub name: String,
    /// The whole content.
    pub bytes: Vec<u8>,
}

/// Reads the known files that exist, in a fixed order, then the licence files by name.
pub(super) fn read(dir: &Path) -> Result<Vec<SideFile>, HfError> {
    let mut names: Vec<String> = NAMES.map(String::from).into();
    let mut licences = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| HfError::io(dir, e))? {
        let entry = entry.map_err(|e| HfError::io(dir, e))?;
        // A name that is not UTF-8 begins with no known prefix that matters to anybody.
        let Ok(name) = entry.file_name().into_string() else { continue };
        let is_licence = LICENCE_PREFIXES.iter().any(|prefix| name.starts_with(prefix));
        if is_licence && is_section_name(&name) && dir.join(&name).is_file() {
            licences.push(name);
        }
    }
    if licences.len() > MAX_LICENCES {
        let count = licences.len();
        let problem = format!("has {count} files LICENSE* and NOTICE*; keep at most {MAX_LICENCES} of them");
        return Err(HfError::bad(dir, problem));
    }
    licences.sort();
    names.extend(licences);

    let mut files = Vec::new();
    for name in names {
        let path = dir.join(&name);
        let limit = if LARGE_NAMES.contains(&name.as_str()) { MAX_SMALL_FILE_BYTES } else { MAX_USUAL_BYTES };
        let Some(bytes) = read_small_file(&path, limit)? else { continue };
        if bytes.starts_with(b"version https://git-lfs") {
            return Err(HfError::bad(&path, "is a Git LFS pointer, not the file; run `git lfs pull`"));
        }
        if name.ends_with(".json") {
            serde_json::from_slice::<IgnoredAny>(&bytes)
                .map_err(|e| HfError::bad(&path, format!("is not JSON: {e}; fetch the file again")))?;
        }
        files.push(SideFile { name, bytes });
    }
    Ok(files)
}

/// Whether a section of a `.mrt` file can have this name.
fn is_section_name(name: &str) -> bool {
    name.len() <= 32 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b))
}

/// The value of `license:` in the YAML front matter of README.md, as model cards have it.
pub(super) fn licence(dir: &Path) -> Result<Option<String>, HfError> {
    let Some(readme) = read_small_file(&dir.join(README), MAX_SMALL_FILE_BYTES)? else { return Ok(None) };
    Ok(front_matter_licence(&String::from_utf8_lossy(&readme)))
}

fn front_matter_licence(readme: &str) -> Option<String> {
    let mut lines = readme.lines();
    if lines.next()?.trim_end() != "---" {
        return None;
    }
    let front_matter = lines.take_while(|line| line.trim_end() != "---");
    let mut values = front_matter.filter_map(|line| line.strip_prefix("license:"));
    let value = values.next()?.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_licences_whose_names_fit_a_section() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["NOTICE", "LICENSE-MIT", "LICENSE (old)", "my-LICENSE", "LICENSE-with-a-name-beyond-32-bytes"]
        {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        std::fs::create_dir(dir.path().join("LICENSES")).unwrap();
        let files = read(dir.path()).unwrap();
        assert_eq!(files.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["LICENSE-MIT", "NOTICE"]);
        assert_eq!(files[1].bytes, b"NOTICE");
    }

    #[test]
    fn finds_the_licence_in_the_front_matter_only() {
        let licence = |readme: &str| front_matter_licence(readme);
        assert_eq!(
            licence("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n").as_deref(),
            Some("apache-2.0")
        );
        assert_eq!(licence("---\r\nlicense: \"mit\"\r\n---\r\n").as_deref(), Some("mit"));
        assert_eq!(licence("---\nlanguage: en\n---\nlicense: mit\n"), None);
        assert_eq!(licence("license: mit\n"), None);
        assert_eq!(licence("---\nlicense:\n- mit\n---\n"), None);
        assert_eq!(licence(""), None);
    }
}
