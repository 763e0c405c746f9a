//! Mounts of the private namespace: what would answer names behind our back is covered, and resolv.conf is ours.
//!
//! Everything is written on a tmpfs that was mounted here. The host's own files are never opened for writing.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::namespaces::forbidden;
use super::{RootlessError, step};

/// Folders of the path sockets by which name look-ups go around a network namespace: of nss-resolve, nscd, nss-mdns, and
/// the system bus, on which systemd-resolved and others answer as well. Whole folders: a socket that is made anew while
/// the command runs would not be covered. Where /var/run is no link to /run, it has them too.
const SIDE_DOORS: [&str; 8] = [
    "/run/systemd/resolve",
    "/run/nscd",
    "/run/avahi-daemon",
    "/run/dbus",
    "/var/run/systemd/resolve",
    "/var/run/nscd",
    "/var/run/avahi-daemon",
    "/var/run/dbus",
];
/// What programs read.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Longer chains of links lead nowhere (path_resolution(7) allows 40).
const MOST_LINKS: usize = 40;
/// Where a file is made before it is bound to its place.
const STAGE: &str = "/etc";
const NONE: Option<&str> = None;

/// Covers the path sockets that would answer names behind our back; returns the folders that are empty, and ours, now.
pub(super) fn hide_side_doors() -> Result<Vec<PathBuf>, RootlessError> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).map_err(forbidden("make mounts private"))?;
    let mut covered: Vec<PathBuf> = Vec::new();
    for door in SIDE_DOORS.iter().filter_map(|door| fs::canonicalize(door).ok()).filter(|door| door.is_dir()) {
        if covered.contains(&door) {
            continue;
        }
        mount_tmpfs(&door).map_err(step(&format!("cover {}", door.display())))?;
        covered.push(door);
    }
    Ok(covered)
}

/// Puts a resolv.conf of ours where programs look for one. `covered`: folders whose content is ours already.
pub(super) fn write_resolv_conf(nameserver: IpAddr, covered: &[PathBuf]) -> Result<(), RootlessError> {
    let text = format!("# Written by tunproxy for this private namespace.\nnameserver {nameserver}\noptions edns0\n");
    let act = || step::<io::Error>(&format!("cover {RESOLV_CONF}"));
    if let Ok(there) = fs::canonicalize(RESOLV_CONF) {
        return cover_file(&there, &text).map_err(act());
    }
    // A link into a folder that was covered just now, as that of systemd-resolved.
    let target = link_target(Path::new(RESOLV_CONF));
    if let Some(parent) = target.parent().and_then(|parent| fs::canonicalize(parent).ok())
        && covered.contains(&parent)
    {
        return write_new(&target, &text).map_err(act());
    }
    // Missing, or a link to nothing: a file can only be added to a folder that is ours.
    let path = Path::new(RESOLV_CONF);
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let folder = fs::canonicalize(folder).map_err(act())?;
    replace_folder(&folder, name.as_ref()).map_err(act())?;
    write_new(&folder.join(name), &text).map_err(act())
}

/// Follows links as far as they lead, to what may not exist.
fn link_target(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        match fs::read_link(&path) {
            Ok(target) => path = path.parent().unwrap_or(Path::new("/")).join(target),
            Err(_) => break,
        }
    }
    path
}

/// Binds a file with `text` over `target`.
fn cover_file(target: &Path, text: &str) -> io::Result<()> {
    let hidden = handle(target)?;
    // Not in the folder of `target`, which may be `/`. This one there is: the way to `target` began in it.
    let folder = fs::canonicalize(STAGE)?;
    mount_tmpfs(&folder)?;
    let source = folder.join("resolv.conf");
    let bound = write_new(&source, text)
        .and_then(|()| Ok(mount(Some(&source), &through(&hidden), NONE, MsFlags::MS_BIND, NONE)?));
    // The bound file lives on without the folder that it was made in.
    umount2(&folder, MntFlags::MNT_DETACH)?;
    bound
}

/// Puts in place of `folder` one of ours that shows the same entries, except the one called `without`.
fn replace_folder(folder: &Path, without: &Path) -> io::Result<()> {
    let hidden = handle(folder)?;
    mount_tmpfs(folder)?;
    let hidden = through(&hidden);
    for entry in fs::read_dir(&hidden)? {
        let entry = entry?;
        let name = entry.file_name();
        if Path::new(&name) == without {
            continue;
        }
        let (from, to, kind) = (hidden.join(&name), folder.join(&name), entry.file_type()?);
        if kind.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
            continue;
        }
        if kind.is_dir() {
            fs::create_dir(&to)?;
        } else {
            File::create(&to)?;
        }
        // With what is mounted below: an unprivileged namespace may not show what a mount had hidden.
        mount(Some(&from), &to, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
    }
    Ok(())
}

/// Writes a file where there must be none: on a tmpfs of ours there is none, and one of the host's own is not touched.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    File::create_new(path)?.write_all(text.as_bytes())
}

/// Covers a folder. Never `/`: a mount there does not change what this process takes for its root, and everything that
/// is meant for the tmpfs would be written on the host's own files.
fn mount_tmpfs(at: &Path) -> io::Result<()> {
    if at.parent().is_none() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the root cannot be covered"));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some("mode=0755"))?)
}

/// Holds a file or folder, so that it can still be named when something is mounted over it.
fn handle(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)
}

/// The name of what `handle` holds.
fn through(handle: &File) -> PathBuf {
    format!("/proc/self/fd/{}", handle.as_raw_fd()).into()
}
