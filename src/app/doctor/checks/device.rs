//! The TUN, and its MTU beside that of the uplinks.

use super::super::finding::Finding;
use super::super::record::Record;

/// What every link carries that is no tunnel (Ethernet).
const ORDINARY: u32 = 1500;

pub(super) fn check(record: &Record) -> Vec<Finding> {
    let Some(plan) = record.plan() else {
        return record.plan_or_start().map_or_else(Vec::new, |plan| narrow(record, plan.mtu));
    };
    let Some(tun) = record.links.iter().find(|link| link.name == plan.tun) else {
        return vec![Finding::problem(
            format!("the TUN {} is gone, though tunproxy runs", plan.tun),
            "tunproxy ends by itself then, and puts the host back: look again, and see who deleted it in its log. If it \
             does not end, stop it: `sudo tunproxy stop`",
        )];
    };
    if !tun.up {
        return vec![Finding::problem(
            format!("the TUN {} is down", tun.name),
            "tunproxy switches it on again within a second, with its routes: look again. If it stays down, its log says \
             why",
        )];
    }
    let mut found = Vec::new();
    if tun.mtu != plan.mtu {
        found.push(Finding::warning(
            format!("the TUN's MTU is {}, and tunproxy set it to {}", tun.mtu, plan.mtu),
            format!(
                "tunproxy sets it back within a second: look again. If it does not, `sudo ip link set {} mtu {}`",
                tun.name, plan.mtu
            ),
        ));
    }
    found.extend(narrow(record, tun.mtu));
    if found.is_empty() {
        found.push(Finding::fine(format!("the TUN {} is up, with an MTU of {} bytes", tun.name, tun.mtu)));
    }
    found
}

/// Uplinks that carry less than a TUN of `mtu` bytes takes.
fn narrow(record: &Record, mtu: u32) -> Vec<Finding> {
    let narrow = record.uplinks().into_iter().filter(|uplink| uplink.mtu < ORDINARY && uplink.mtu < mtu);
    narrow
        .map(|uplink| {
            Finding::warning(
                format!("the uplink {} carries packets of {} bytes and the TUN takes {mtu}", uplink.name, uplink.mtu),
                format!(
                    "write `tun: {{ mtu: {} }}` into the profile: larger datagrams then need no second try",
                    uplink.mtu.max(1280)
                ),
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::{only_problem, quiet, running, warnings};
    use super::*;

    fn changed(name: &str, change: impl Fn(&mut crate::platform::SeenLink)) -> Vec<Finding> {
        let mut record = running();
        record.links.iter_mut().filter(|link| link.name == name).for_each(change);
        check(&record)
    }

    #[test]
    fn a_tun_that_is_up_is_fine_and_one_that_is_down_or_gone_is_not() {
        assert!(only_problem(&check(&running())).is_none());
        assert!(only_problem(&changed("tunproxy0", |tun| tun.up = false)).unwrap().what.contains("is down"));
        let gone = changed("tunproxy0", |tun| tun.name = "other".to_owned());
        assert!(only_problem(&gone).unwrap().what.contains("is gone"));
    }

    #[test]
    fn an_mtu_that_was_changed_or_that_the_uplink_lacks_is_a_warning() {
        assert!(warnings(&changed("tunproxy0", |tun| tun.mtu = 1300))[0].contains("MTU is 1300"));
        assert!(warnings(&changed("eth0", |eth0| eth0.mtu = 1400))[0].contains("carries packets of 1400 bytes"));
        assert!(warnings(&changed("eth0", |eth0| eth0.mtu = 9000)).is_empty());
    }

    #[test]
    fn a_narrow_uplink_is_told_before_a_start_too() {
        let mut record = quiet();
        assert!(check(&record).is_empty());
        record.links.iter_mut().for_each(|link| link.mtu = 1280);
        assert!(warnings(&check(&record))[0].contains("eth0 carries packets of 1280 bytes and the TUN takes 1500"));
    }
}
