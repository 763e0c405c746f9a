//! Who listens on a port: proc(5) names the socket's inode, and the process that holds a descriptor of it.

use std::fs;
use std::path::Path;

/// The state of a listening socket in /proc/net/tcp.
const LISTEN: &str = "0A";

/// The process that listens on TCP `port`, as far as we may see it: "nginx (pid 812)".
pub fn tcp_listener(port: u16) -> Option<String> {
    let find = |table: &str| inode(&fs::read_to_string(table).ok()?, port).map(ToOwned::to_owned);
    let inode = find("/proc/net/tcp").or_else(|| find("/proc/net/tcp6"))?;
    let socket = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|process| {
        let pid = process.file_name().to_str()?.parse::<u32>().ok()?;
        let descriptors = fs::read_dir(process.path().join("fd")).ok()?;
        let holds = |link: &Path| fs::read_link(link).is_ok_and(|target| target.as_os_str() == socket.as_str());
        if !descriptors.filter_map(Result::ok).any(|descriptor| holds(&descriptor.path())) {
            return None;
        }
        let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
        Some(format!("{} (pid {pid})", name.trim()))
    })
}

/// The inode of the socket that listens on `port`, from the text of /proc/net/tcp.
fn inode(table: &str, port: u16) -> Option<&str> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (_, local) = fields.nth(1)?.rsplit_once(':')?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        (state == LISTEN && u16::from_str_radix(local, 16) == Ok(port)).then_some(inode)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_listener_is_found_among_other_states() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1EDC 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 11 1 0\n   \
            1: 0100007F:1EDC 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 22 1 0\n";
        assert_eq!(inode(table, 7900), Some("22"));
        assert_eq!(inode(table, 80), None);
        assert_eq!(inode("", 80), None);
    }

    #[test]
    fn our_own_listener_is_ours() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let holder = tcp_listener(listener.local_addr().unwrap().port()).unwrap();
        assert!(holder.contains(&format!("(pid {})", std::process::id())), "{holder}");
    }
}
