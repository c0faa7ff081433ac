//! Weights inside a ZIP file or Android package: `zip_entry FILE.zip NAME` opens the entry NAME, which must be stored, not
//! compressed (`zip -0`; `noCompress "mrt"` in an Android build), and maps it where it lies.
//!
//! `zipalign -P 16` or `-p 4` puts it at a page; the weights are used in place from any multiple of 64 bytes, and are read
//! into memory otherwise. On Android, `AAsset_openFileDescriptor64` gives descriptor, offset and length at once.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use mruntime::{Model, OpenOptions, Pool, performance_cores};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [zip, name] = args.as_slice() else { return Err("usage: zip_entry FILE.zip NAME".into()) };
    let mut file = File::open(zip)?;
    let (offset, bytes) = find_stored(&mut file, name)?;
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open_within(file, offset, bytes, Path::new(zip), &OpenOptions::default(), &mut pool)?;
    println!("{name}: {bytes} bytes from {offset}, root {}, weights {:?}", model.root(), model.backing());
    Ok(())
}

/// Offset and length of a stored entry (PKWARE's APPNOTE.TXT, 4.3.7, 4.3.12 and 4.3.16; no ZIP64).
fn find_stored(file: &mut File, name: &str) -> Result<(u64, u64), Box<dyn Error>> {
    let u16_at = |bytes: &[u8], at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let u32_at = |bytes: &[u8], at: usize| u16_at(bytes, at) | u16_at(bytes, at + 2) << 16;
    // The end record is among the last 22 bytes and a comment of up to 65535.
    let len = file.metadata()?.len();
    let tail_len = len.min(22 + 65535);
    let mut tail = vec![0; tail_len as usize];
    file.seek(SeekFrom::Start(len - tail_len))?;
    file.read_exact(&mut tail)?;
    let end = tail.windows(4).rposition(|four| four == b"PK\x05\x06").filter(|&at| tail.len() - at >= 22);
    let end = &tail[end.ok_or("not a ZIP file")?..];
    let (mut directory, start) = (vec![0; u32_at(end, 12).min(len) as usize], u32_at(end, 16));
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut directory)?;

    let mut rest = directory.as_slice();
    while rest.len() >= 46 && rest.starts_with(b"PK\x01\x02") {
        let name_len = u16_at(rest, 28) as usize;
        let entry_len = 46 + name_len + (u16_at(rest, 30) + u16_at(rest, 32)) as usize;
        if rest.get(46..46 + name_len) == Some(name.as_bytes()) {
            if u16_at(rest, 10) != 0 {
                return Err(format!("{name} is compressed; store it (zip -0)").into());
            }
            let (bytes, header) = (u32_at(rest, 24), u32_at(rest, 42));
            let mut local = [0; 30];
            file.seek(SeekFrom::Start(header))?;
            file.read_exact(&mut local)?;
            return Ok((header + 30 + u16_at(&local, 26) + u16_at(&local, 28), bytes));
        }
        rest = rest.get(entry_len..).unwrap_or_default();
    }
    Err(format!("there is no {name} in the ZIP file").into())
}
