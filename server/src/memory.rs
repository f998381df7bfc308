//! The memory of this process and of its cgroup.

/// What the operating system says about memory, in bytes; zero or `None` where it does not say.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessMemory {
    pub resident: usize,
    /// Largest resident so far.
    pub peak: usize,
    /// Charged to the cgroup.
    pub cgroup: Option<usize>,
    /// The cgroup's limit, when one is in force.
    pub cgroup_limit: Option<usize>,
}

impl ProcessMemory {
    /// Reads `/proc` and `/sys/fs/cgroup` (both cgroup versions).
    pub fn read() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<usize>().ok().map(|kib| kib * 1024)
        };
        let number = |paths: [&str; 2]| {
            paths.iter().find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok())
        };
        Self {
            resident: field("VmRSS:").unwrap_or(0),
            peak: field("VmHWM:").unwrap_or(0),
            cgroup: number(["/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes"]),
            // Version 1 writes a number near 2^63 for "no limit"; version 2 writes "max", which does not parse.
            cgroup_limit: number(["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"])
                .filter(|&limit| limit < 1 << 60),
        }
    }
}
