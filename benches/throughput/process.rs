//! What /proc says of a process and of the machine (proc_pid_stat(5), proc_stat(5)).

use std::fs;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// `/proc` counts CPU time in hundredths of a second (USER_HZ) on every architecture that we build for.
const TICKS_PER_SECOND: f64 = 100.0;

/// A running process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Process(pub(crate) u64);

impl Process {
    /// CPU seconds of all its threads, those that have ended too, in user space and in the kernel.
    pub(crate) fn cpu(self) -> f64 {
        let stat = read(&format!("/proc/{}/stat", self.0));
        // The name in parentheses may hold anything; utime and stime are fields 14 and 15.
        let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let times = behind_name.split_whitespace().skip(11).take(2);
        times.map(|ticks| ticks.parse::<f64>().expect("a number of ticks")).sum::<f64>() / TICKS_PER_SECOND
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(self) -> u64 {
        self.status_field("/proc", "VmRSS:") * 1024
    }

    /// How often its threads have gone to sleep, and so will have woken: voluntary context switches.
    pub(crate) fn wakeups(self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0)).expect("the threads of a running process");
        let thread = |entry: fs::DirEntry| {
            let status = read(&entry.path().join("status").display().to_string());
            field(&status, "voluntary_ctxt_switches:")
        };
        tasks.flatten().map(thread).sum()
    }

    fn status_field(self, root: &str, name: &str) -> u64 {
        field(&read(&format!("{root}/{}/status", self.0)), name)
    }
}

/// CPU seconds that all processors together have been busy, with whatever: the other programs of the machine are in it.
pub(crate) fn machine_busy() -> f64 {
    let stat = read("/proc/stat");
    let fields: Vec<f64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).flat_map(str::parse).collect();
    // user, nice, system, idle, iowait, irq, softirq
    [0, 1, 2, 5, 6].iter().filter_map(|at| fields.get(*at)).sum::<f64>() / TICKS_PER_SECOND
}

/// Processors.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Ten thousand flows are ten thousand descriptors.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The number behind `name` at the start of a line.
fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{name}{line}"))
}
