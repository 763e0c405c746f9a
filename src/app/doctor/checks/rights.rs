//! What this program may do: the TUN's node, the capability, and user namespaces for `exec`.

use super::super::finding::Finding;
use super::super::record::{Record, RunState};

/// Parameters that forbid user namespaces: path, the value that does, and the one that allows them.
pub(in crate::app::doctor) const NAMESPACES: [(&str, &str, &str); 5] = [
    ("user/max_user_namespaces", "0", "15000"),
    ("user/max_net_namespaces", "0", "15000"),
    ("user/max_mnt_namespaces", "0", "15000"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
];

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let mut found = namespaces(record);
    let rights = &record.rights;
    let wants_tun = record.profile.as_ref().is_none_or(|profile| profile.tun);
    if matches!(record.run, RunState::Answers { .. }) || !wants_tun {
        return found;
    }
    match (&rights.node_closed, rights.node) {
        (_, false) => found.push(Finding::problem(
            "/dev/net/tun is missing: the kernel's TUN driver is not loaded",
            "load it: `sudo modprobe tun`; in a container, pass the device in (for Docker: --device /dev/net/tun)",
        )),
        (Some(why), true) if rights.network => found.push(Finding::problem(
            format!("/dev/net/tun does not open: {why}"),
            "open it: `sudo chmod 0666 /dev/net/tun`; in a container, pass the device in (for Docker: --device /dev/net/tun)",
        )),
        // Whoever else lacks the capability as well, and is told what takes both.
        (Some(_) | None, true) => {}
    }
    if !rights.network && !rights.by_file {
        found.push(Finding::warning(
            "this user cannot start a run with a TUN, only `exec` and `demo`",
            format!(
                "use sudo, or give the program the right once: `sudo setcap \
                 cap_net_admin,cap_net_raw,cap_net_bind_service+ep {}`",
                std::env::current_exe().map_or_else(|_| "tunproxy".to_owned(), |path| path.display().to_string())
            ),
        ));
    } else if found.is_empty() {
        found.push(Finding::fine("a TUN may be made, and private namespaces too"));
    }
    found
}

fn namespaces(record: &Record) -> Vec<Finding> {
    let forbids = NAMESPACES.into_iter().filter(|(path, forbidden, _)| record.parameter(path) == Some(*forbidden));
    forbids
        .map(|(path, value, allowed)| {
            let name = path.replace('/', ".");
            // A limit holds for root as for everybody.
            let (who, or) = match path.starts_with("user/") {
                true => ("nobody can", ""),
                false => ("ordinary users cannot", ", or run those two as root"),
            };
            Finding::warning(
                format!("{name} is {value}: {who} make private namespaces, which `exec` and `demo` need"),
                format!("allow them: `sudo sysctl -w {name}={allowed}`{or}"),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::*;

    #[test]
    fn root_with_a_node_is_fine_and_so_is_a_run() {
        assert!(only_problem(&check(&quiet())).is_none());
        assert!(check(&running()).is_empty());
    }

    #[test]
    fn a_node_that_is_missing_or_closed_is_told_apart() {
        let mut record = quiet();
        record.rights.node_closed = Some("Permission denied".to_owned());
        assert!(only_problem(&check(&record)).unwrap().what.contains("does not open"));
        record.rights.node = false;
        assert!(only_problem(&check(&record)).unwrap().advice.contains("modprobe tun"));
        record.profile.as_mut().unwrap().tun = false;
        assert!(check(&record).is_empty());
    }

    #[test]
    fn an_ordinary_user_is_told_what_to_do_and_has_no_problem() {
        let mut record = quiet();
        (record.rights.network, record.rights.node_closed) = (false, Some("Permission denied".to_owned()));
        let found = check(&record);
        assert!(only_problem(&found).is_none() && found[0].advice.contains("setcap"), "{found:?}");
    }

    #[test]
    fn each_switch_that_forbids_namespaces_is_named_with_what_allows_them() {
        for (path, forbidden, allowed) in NAMESPACES {
            let mut record = quiet();
            record.parameters.insert(path.to_owned(), allowed.to_owned());
            assert!(warnings(&check(&record)).is_empty());
            record.parameters.insert(path.to_owned(), forbidden.to_owned());
            assert!(check(&record)[0].advice.contains(&format!("={allowed}")), "{path}");
        }
    }
}
