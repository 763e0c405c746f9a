//! How much memory there is for this process: the machine's, or what its control group allows (cgroups(7)).

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of memory that this process could have at most, as far as the kernel says so.
#[must_use]
pub fn memory() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let of_groups = groups.lines().filter_map(files).flatten().filter_map(|file| limit(&file));
    of_machine.into_iter().chain(of_groups).min()
}

/// `MemTotal:       24612345 kB`.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The files that may limit a group, which a line like `0::/system.slice/x.service` or `4:memory:/x` names: those of the
/// group and of all above it.
fn files(line: &str) -> Option<Vec<PathBuf>> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, group) = (parts.next()?, parts.next()?);
    let (root, name) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max"),
        _ if controllers.split(',').any(|it| it == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        _ => return None,
    };
    let (root, path) = (Path::new(root), Path::new(group.trim_start_matches('/')));
    Some(path.ancestors().map(|above| root.join(above).join(name)).collect())
}

/// `max`, or a number of bytes.
fn limit(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_memory_is_read_in_kilobytes() {
        assert_eq!(total("MemFree: 7 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        assert_eq!(total("nothing of the kind"), None);
    }

    #[test]
    fn a_group_is_limited_by_all_above_it() {
        let files = files("0::/a.slice/b.service").unwrap();
        let expected = ["/sys/fs/cgroup/a.slice/b.service", "/sys/fs/cgroup/a.slice", "/sys/fs/cgroup"];
        assert_eq!(files, expected.map(|dir| Path::new(dir).join("memory.max")));
        assert_eq!(super::files("3:cpu:/x"), None);
        assert_eq!(super::files("4:cpu,memory:/").unwrap().len(), 1);
    }

    #[test]
    fn there_is_some_memory_here() {
        assert!(memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
