//! What results depend on besides what is measured, and what a process takes.

use std::io::{self, Write};

use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where and when a result was made, and by which program.
#[derive(Serialize)]
pub struct Origin {
    pub machine: Machine,
    pub version: &'static str,
    /// What `git describe` said when the program was built; none if that was not in a checkout.
    pub commit: Option<&'static str>,
    /// UTC, RFC 3339.
    pub date: String,
}

impl Origin {
    pub fn now() -> Origin {
        let now = Timestamp::now();
        Origin {
            machine: Machine::this(),
            version: env!("CARGO_PKG_VERSION"),
            commit: option_env!("MR_COMMIT"),
            date: now.round(Unit::Second).unwrap_or(now).to_string(),
        }
    }

    /// `result`, an object, with this in it.
    pub fn with(&self, mut result: Value) -> serde_json::Result<Value> {
        if let (Some(result), Value::Object(origin)) = (result.as_object_mut(), serde_json::to_value(self)?) {
            result.extend(origin);
        }
        Ok(result)
    }

    /// The first lines of a table.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let Machine { cpu, cores, os, arch, kernel, huge_pages } = &self.machine;
        writeln!(out, "machine   {cpu}, {cores} cores, {os} {kernel} {arch}, huge pages: {huge_pages}")?;
        let commit = self.commit.map_or(String::new(), |commit| format!(" ({commit})"));
        writeln!(out, "mr-bench  {}{commit}, {}", self.version, self.date)
    }
}

/// The machine.
#[derive(Serialize)]
pub struct Machine {
    /// The processor's name, where the system tells it.
    pub cpu: String,
    /// Logical cores that this process may use.
    pub cores: usize,
    /// Operating system and architecture.
    pub os: &'static str,
    pub arch: &'static str,
    /// The system's release; empty where it is not known.
    pub kernel: String,
    /// When anonymous memory gets huge pages: `always`, `madvise` or `never`; `unknown` where the system does not tell.
    pub huge_pages: String,
}

impl Machine {
    pub fn this() -> Machine {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let huge_pages = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
        Machine {
            cpu: name.map_or("unknown processor".into(), |(_, name)| name.trim().to_owned()),
            cores: mr_cli::all_cores(),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
            kernel: kernel.trim().to_owned(),
            huge_pages: chosen(&huge_pages.unwrap_or_default()).unwrap_or("unknown").to_owned(),
        }
    }
}

/// The word in brackets, which is how Linux marks the choice among several.
fn chosen(choices: &str) -> Option<&str> {
    Some(choices.split_once('[')?.1.split_once(']')?.0)
}

/// What this process has taken so far.
#[derive(Clone, Serialize, Deserialize, Debug, Default, PartialEq)]
pub struct Memory {
    /// KiB of its own, and of files.
    pub anonymous: u64,
    pub file: u64,
    /// Pages that were in memory but not mapped, and pages that came from storage.
    pub minor_faults: u64,
    pub major_faults: u64,
    /// Bytes that came from storage, where the system tells.
    pub storage_read: Option<u64>,
}

impl Memory {
    /// Of this process, as Linux tells it; else zeros.
    pub fn now() -> Memory {
        let proc = |name| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        let (status, stat, io) = (proc("status"), proc("stat"), proc("io"));
        let field = |text: &str, name| -> Option<u64> {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.trim().trim_end_matches(" kB").parse().ok()
        };
        // The second field, the name, may hold blanks; its parenthesis ends it.
        let stat: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let stat = |field: usize| stat.get(field - 3).and_then(|n| n.parse().ok()).unwrap_or_default();
        Memory {
            anonymous: field(&status, "RssAnon").unwrap_or_default(),
            file: field(&status, "RssFile").unwrap_or_default()
                + field(&status, "RssShmem").unwrap_or_default(),
            minor_faults: stat(10),
            major_faults: stat(12),
            storage_read: field(&io, "read_bytes"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_in_brackets() {
        assert_eq!(chosen("always [madvise] never\n"), Some("madvise"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn the_date_has_whole_seconds() {
        let date = Origin::now().date;
        assert!(date.len() == "2026-01-01T00:00:00Z".len() && date.ends_with('Z'), "{date}");
    }
}
