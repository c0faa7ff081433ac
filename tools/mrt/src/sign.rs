//! `mrt sign` and `mrt verify --key`: signatures over the root digest, in minisign's format.
//!
//! What is signed is one line of text, so that minisign itself can check the signature too:
//! `mrt root `, the root digest as 64 hexadecimal digits, a line feed.

use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use ct_codecs::{Base64, Decoder};
use minisign::{PublicKey, PublicKeyBox, SecretKey, SecretKeyBox, SignatureBox};
use mr_cli::{FileError, NewFile};
use mrt_format::Digest;

use crate::file::MrtFile;

/// Keys and signatures are a few lines; more is something else.
const MAX_BYTES: u64 = 64 << 10;

/// The text that is signed.
fn message(root: &Digest) -> Cursor<String> {
    Cursor::new(format!("mrt root {root}\n"))
}

/// Where a file's signature is unless a name is given: beside it, with minisign's ending.
pub fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".minisig");
    name.into()
}

/// Signs the root of `file` with the secret key in `key`, asking for its password if it has one.
pub fn sign(file: &MrtFile, key: &Path, out: &Path) -> mr_cli::Result<()> {
    let bad_key = |problem: String| FileError::new(key, format!("is not a minisign secret key: {problem}"));
    let text = read_small(key)?;
    let parse = || SecretKeyBox::from_string(&text).map_err(|e| bad_key(one_line(&e)));
    let unencrypted = parse()?.into_unencrypted_secret_key();
    let secret = match unencrypted.or_else(|e| without_checksum(&text).ok_or(e)) {
        Ok(secret) => secret,
        // The crate tells a key with a password from what is no key by this text alone.
        Err(e) if e.to_string().contains("might be encrypted") => {
            let password = rpassword::prompt_password(format!("password of {}: ", key.display()))
                .map_err(|e| FileError::new(key, format!("cannot ask for its password: {e}")))?;
            parse()?.into_secret_key(Some(password)).map_err(|e| FileError::new(key, one_line(&e)))?
        }
        Err(e) => return Err(bad_key(one_line(&e)).into()),
    };
    let root = file.prologue.root();
    let name = file.path.file_name().unwrap_or_default().to_string_lossy();
    let comment = format!("file:{}\troot:{root}", name.replace(char::is_control, "?"));
    let signature = minisign::sign(None, &secret, message(root), Some(&comment), None)
        .map_err(|e| FileError::new(key, one_line(&e)))?;
    // The halves of a key without checksum may not belong together; what such a key signs nobody can verify.
    PublicKey::from_secret_key(&secret)
        .and_then(|public| minisign::verify(&public, &signature, message(root), true, false, false))
        .map_err(|_| bad_key("it is damaged".to_owned()))?;
    let out = NewFile::create(out, [&file.path, key])?;
    out.write(|out| Ok(write!(out, "{}", signature.into_string())?))?;
    Ok(out.commit()?)
}

/// The secret key in `text` if it is one that `minisign -G -W` made: those have no password, and zeros in place of the
/// checksum, which the crate does not accept.
fn without_checksum(text: &str) -> Option<SecretKey> {
    let bytes = Base64::decode_to_vec(text.lines().nth(1)?, None).ok()?;
    let (algorithm, checksum) = (bytes.get(..6)?, bytes.get(126..158)?);
    let is_one = bytes.len() == 158 && algorithm == b"Ed\0\0B2" && checksum.iter().all(|&byte| byte == 0);
    is_one.then(|| SecretKey::from_bytes(&bytes).ok())?
}

/// A public key: a file as minisign writes it, or the key's own text.
pub fn read_key(key: &str) -> Result<PublicKey, FileError> {
    let path = Path::new(key);
    let bad = |problem: String| {
        FileError::new(path, format!("is neither a minisign public key nor its file: {problem}"))
    };
    if let Ok(key) = PublicKey::from_base64(key) {
        return Ok(key);
    }
    let text = read_small(path)?;
    let key = PublicKeyBox::from_string(&text).and_then(PublicKeyBox::into_public_key);
    key.map_err(|e| bad(one_line(&e)))
}

/// Checks that the signature in the file `signature` is by `key` and over the root of `file`. Returns the key's id.
pub fn check(file: &MrtFile, key: &PublicKey, signature: &Path) -> Result<String, FileError> {
    let error = |problem: String| FileError::new(signature, problem);
    let text = read_small(signature)?;
    let signed = SignatureBox::from_string(&text)
        .map_err(|e| error(format!("is not a minisign signature: {}", one_line(&e))))?;
    // The crate panics where the signature of the comment is too short.
    let of_comment = text.lines().nth(3).and_then(|line| Base64::decode_to_vec(line.trim(), None).ok());
    if of_comment.is_none_or(|bytes| bytes.len() != 64) {
        return Err(error("is not a minisign signature: its last line is not 64 bytes in Base64".into()));
    }
    let (by, expected) = (key_id(signed.keynum()), key_id(key.keynum()));
    if by != expected {
        return Err(error(format!("is by another key: {by}, not {expected}")));
    }
    let is_over = |root: &Digest| minisign::verify(key, &signed, message(root), true, false, false).is_ok();
    let root = file.prologue.root();
    if is_over(root) {
        return Ok(by);
    }
    // A signature over another root names it in its comment, which is signed too.
    let comment = signed.trusted_comment().unwrap_or_default();
    let other = comment.split('\t').find_map(|part| part.strip_prefix("root:")?.parse().ok());
    Err(error(match other {
        Some(other) if is_over(&other) => {
            format!("is a signature of another file: over root {other}, not {root}")
        }
        _ => format!("is not a valid signature by key {by} over root {root}"),
    }))
}

/// A key's id as minisign shows it.
fn key_id(keynum: &[u8]) -> String {
    keynum.iter().rev().map(|byte| format!("{byte:02X}")).collect()
}

fn read_small(path: &Path) -> Result<String, FileError> {
    let meta = std::fs::metadata(path).map_err(|e| FileError::new(path, e))?;
    if !meta.is_file() || meta.len() > MAX_BYTES {
        return Err(FileError::new(path, "is no file of a key or signature"));
    }
    std::fs::read_to_string(path).map_err(|e| FileError::new(path, e))
}

fn one_line(error: &minisign::PError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
