//! What results depend on besides the program, and what a process takes.

use serde::{Deserialize, Serialize};

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
}

impl Machine {
    pub fn this() -> Machine {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Machine {
            cpu: name.map_or("unknown processor".into(), |(_, name)| name.trim().to_owned()),
            cores: mr_cli::all_cores(),
            os: std::env::consts::OS,
            arch: std::env::consts::ARCH,
        }
    }
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
