//! The pages that weights sit in.

use serde::{Deserialize, Serialize};

/// Pages of memory in KiB, of the mapping that the weights are in.
#[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
pub struct Pages {
    /// In memory at all.
    pub resident: u64,
    /// Of these, huge pages of a file.
    pub file_huge: u64,
    /// Of these, anonymous huge pages.
    pub anonymous_huge: u64,
}

impl Pages {
    /// Huge pages of either kind.
    pub fn huge(&self) -> u64 {
        self.file_huge + self.anonymous_huge
    }

    /// Of the mapping that `bytes` begin in; where the system does not tell, none.
    pub fn of(bytes: &[u8]) -> Option<Pages> {
        // The names of mapped files need not be UTF-8.
        let smaps = std::fs::read("/proc/self/smaps").ok()?;
        parse_smaps(&String::from_utf8_lossy(&smaps), bytes.as_ptr().addr())
    }
}

/// The entry of Linux' smaps for the mapping that holds `address`.
fn parse_smaps(smaps: &str, address: usize) -> Option<Pages> {
    let mut lines = smaps.lines();
    lines.find(|line| mapping(line).is_some_and(|(start, end)| (start..end).contains(&address)))?;
    let mut pages = Pages { resident: 0, file_huge: 0, anonymous_huge: 0 };
    for line in lines.take_while(|line| mapping(line).is_none()) {
        let Some((name, value)) = line.split_once(':') else { continue };
        let Some(Ok(kib)) = value.trim().strip_suffix(" kB").map(str::parse) else { continue };
        match name {
            "Rss" => pages.resident = kib,
            "FilePmdMapped" => pages.file_huge = kib,
            "AnonHugePages" => pages.anonymous_huge = kib,
            _ => {}
        }
    }
    Some(pages)
}

/// The addresses in a line that begins an entry: `7f0000000000-7f0000200000 r--s ...`.
fn mapping(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
10000-20000 r--s 00000000 fe:00 1234                       /a/model.mrt
Size:                 64 kB
Rss:                  48 kB
AnonHugePages:         0 kB
FilePmdMapped:        32 kB
VmFlags: rd sh
20000-30000 rw-p 00000000 00:00 0 
Rss:                   4 kB
AnonHugePages:         2 kB
";

    #[test]
    fn the_mapping_of_an_address_is_found() {
        let file = Pages { resident: 48, file_huge: 32, anonymous_huge: 0 };
        assert_eq!(parse_smaps(SMAPS, 0x10000), Some(file));
        let anonymous = Pages { resident: 4, file_huge: 0, anonymous_huge: 2 };
        assert_eq!(parse_smaps(SMAPS, 0x2ffff), Some(anonymous));
        assert_eq!(parse_smaps(SMAPS, 0x30000), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn touched_memory_is_resident() {
        let pages = Pages::of(&vec![1; 1 << 20]).unwrap();
        assert!(pages.resident >= 1 << 10, "{pages:?}");
    }
}
