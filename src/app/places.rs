//! Where the state of a run is, and what of it this user cannot see.

use std::fmt::Write as _;
use std::path::Path;

use nix::unistd::{AccessFlags, access, geteuid};

use crate::platform::person_of;

/// Where the state of a run by root is, by default.
pub const STATE_OF_ROOT: &str = "/var/lib/tunproxy";

/// Whether there is a default state directory of root's that this user, who looks at `state`, may not enter: what a run by
/// root does or has left is then not to be seen.
pub(super) fn hides_from_us(state: &Path) -> bool {
    let roots = Path::new(STATE_OF_ROOT);
    !geteuid().is_root()
        && state != roots
        && roots.exists()
        && access(roots, AccessFlags::R_OK | AccessFlags::X_OK).is_err()
}

/// The option that names `state` on a command line; none for root's own.
pub(super) fn option(state: &Path) -> String {
    if state == Path::new(STATE_OF_ROOT) { String::new() } else { format!(" --state-dir {}", quoted(state)) }
}

/// The command that undoes what a run with this state directory has left, typed by whoever may: for a person's run that is this
/// person, and root is refused.
pub(super) fn cleanup_of(state: &Path) -> String {
    let by = match person_of(state) {
        None => "sudo ".to_owned(),
        Some(person) if person == geteuid().as_raw() => String::new(),
        Some(person) => format!("sudo -u '#{person}' "),
    };
    format!("{by}tunproxy cleanup{}", option(state))
}

/// Where sudo looks for programs (`secure_path` of sudoers(5)), whatever the caller's PATH says.
const SECURE_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The command by which root does `word` with the same profile, as it has to be typed: from any directory, and whether sudo
/// finds this program or not. Root has its own state directory unless `state` was meant for root as well.
pub(super) fn by_root(word: &str, profile: Option<&Path>, state: &Path) -> String {
    let program = std::env::current_exe().ok().filter(|path| {
        let found = |dir: &Path| SECURE_PATH.iter().any(|known| Path::new(known) == dir);
        !path.parent().is_some_and(found)
    });
    let mut line = format!("sudo {} {word}", program.map_or_else(|| "tunproxy".to_owned(), |path| quoted(&path)));
    if let Some(profile) = profile {
        let path = std::path::absolute(profile).unwrap_or_else(|_| profile.to_owned());
        // Writing to a String cannot fail.
        let _ = write!(line, " --profile {}", quoted(&path));
    }
    let of_user = |base: std::ffi::OsString| Path::new(&base).join("tunproxy") == state;
    let own = state.ends_with(".local/state/tunproxy") || std::env::var_os("XDG_STATE_HOME").is_some_and(of_user);
    if !own && state != Path::new(STATE_OF_ROOT) {
        let state = std::path::absolute(state).unwrap_or_else(|_| state.to_owned());
        let _ = write!(line, " --state-dir {}", quoted(&state));
    }
    line
}

/// A path as a shell takes it for one word.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&byte);
    if text.bytes().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_persons_run_is_cleaned_up_by_that_person_and_any_other_by_root() {
        let state = tempfile::tempdir().unwrap();
        let path = state.path().display();
        let us = geteuid().as_raw();
        let own = cleanup_of(state.path());
        let by_root = format!("sudo tunproxy cleanup --state-dir {path}");
        let wanted = if us < 1000 { by_root.clone() } else { format!("tunproxy cleanup --state-dir {path}") };
        assert_eq!(own, wanted);
        // Only root can give a file away.
        let journal = state.path().join("journal");
        std::fs::write(&journal, "").unwrap();
        if std::os::unix::fs::chown(&journal, Some(12345), None).is_ok() {
            assert_eq!(cleanup_of(state.path()), format!("sudo -u '#12345' tunproxy cleanup --state-dir {path}"));
        }
        if std::os::unix::fs::chown(&journal, Some(123), None).is_ok() {
            assert_eq!(cleanup_of(state.path()), by_root, "a service's");
        }
        assert_eq!(cleanup_of(Path::new("/no/such place")), "sudo tunproxy cleanup --state-dir '/no/such place'");
    }

    #[test]
    fn a_command_for_root_names_the_profile_and_a_state_directory_that_was_chosen() {
        let told = |profile: &str, state: &str| by_root("plan", Some(Path::new(profile)), Path::new(state));
        let program = std::env::current_exe().unwrap();
        let sudo = format!("sudo {} plan --profile", program.display());
        assert_eq!(told("/etc/p.yaml", STATE_OF_ROOT), format!("{sudo} /etc/p.yaml"));
        assert_eq!(told("/etc/p.yaml", "/home/a/.local/state/tunproxy"), format!("{sudo} /etc/p.yaml"));
        assert_eq!(told("/a b/it's.yaml", "/srv/t"), format!("{sudo} '/a b/it'\\''s.yaml' --state-dir /srv/t"));
        let here = std::env::current_dir().unwrap().join("p.yaml");
        assert!(told("p.yaml", STATE_OF_ROOT).contains(&quoted(&here)));
    }
}
