//! A plan in the words of the tools: what a person would type to make its changes by hand, in their order, and what
//! undoes them.

use std::fmt;

use serde::Serialize;

use super::QUEUE_LENGTH;
use super::applied::{Step, sysctl_undos};
use super::imp::resolv_conf;
use super::journalled::Journalled;
use super::layout::{self, CAPTURE_STAGE};
use super::plan::HostPlan;
use super::resolver::DnsPlan;
use super::undo::Undo;
use super::words::{parameter, put_back, route, rule, write_file};

/// Changes of one kind, which are made one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// What they are; docs/host-changes.md has a row with these words.
    pub title: &'static str,
    /// What a person would type, in the order in which it is done.
    pub acts: Vec<String>,
    /// What undoes them, at a stop and after a crash.
    pub undone_by: &'static str,
    /// The same as a person would type it, in the order in which it is done.
    pub undo: Vec<String>,
    /// What is undone can be read off the acts, and needs no telling.
    #[serde(skip)]
    plain: bool,
}

/// What the changes of a plan overwrite, so that undoing them can be told.
#[derive(Debug, Clone, Default)]
pub struct Before(Vec<Undo>);

impl Before {
    /// As the host is now, before `plan` is applied and when what `left` tells of has been undone.
    #[must_use]
    pub fn now(plan: &HostPlan, left: &Journalled) -> Self {
        let mut undos: Vec<Undo> = plan.sysctls.iter().filter(|sysctl| !sysctl.of_tun).flat_map(sysctl_undos).collect();
        if let DnsPlan::Rewrite { text, .. } = &plan.dns {
            undos.extend(resolv_conf::undo(std::path::Path::new(resolv_conf::PATH), text));
        }
        Self(undos.into_iter().map(|undo| left.beyond(undo)).collect())
    }

    /// As the run noted it that has applied `plan`.
    #[must_use]
    pub fn journalled(journal: &Journalled, plan: &HostPlan) -> Self {
        let of_tun = format!("/{}/", plan.tun);
        // What the TUN itself was dragged along with vanishes with it.
        let lasts = |undo: &&Undo| !matches!(undo, Undo::Sysctl { path, .. } if path.contains(&of_tun));
        Self(journal.undos().filter(lasts).cloned().collect())
    }
}

/// The kinds of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Device,
    TunParameters,
    Addresses,
    Routes,
    Passes,
    Parameters,
    Firewall,
    Captures,
    Resolver,
}

impl Part {
    fn of(step: &Step, plan: &HostPlan) -> Self {
        match step {
            Step::Sysctl(sysctl) if sysctl.of_tun => Self::TunParameters,
            Step::Sysctl(_) => Self::Parameters,
            Step::Address(_) | Step::Link => Self::Addresses,
            Step::Route(_) => Self::Routes,
            Step::Rule(rule) if layout::stage(rule, &plan.numbers) >= CAPTURE_STAGE => Self::Captures,
            Step::Rule(_) => Self::Passes,
            Step::Firewall => Self::Firewall,
            Step::Resolver => Self::Resolver,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Device => "the TUN device",
            Self::TunParameters => "the TUN's own parameters",
            Self::Addresses => "the TUN's addresses and link",
            Self::Routes => "routes in two tables of our own",
            Self::Passes => "rules that are jump targets or let traffic pass",
            Self::Parameters => "parameters of the host",
            Self::Firewall => "the firewall table",
            Self::Captures => "rules that capture",
            Self::Resolver => "the resolver",
        }
    }

    fn undone_by(self) -> &'static str {
        match self {
            Self::Device => "it vanishes with the process, however that ends",
            Self::TunParameters => "they vanish with the TUN",
            Self::Addresses => "deleting them; they vanish with the TUN",
            Self::Routes => "deleting them; those to the TUN vanish with it, `throw` routes are journalled",
            Self::Passes | Self::Captures => "deleting them, each by a full match; journalled",
            Self::Parameters => "setting them back, with what the kernel changed along with them; journalled",
            Self::Firewall => "the end of the child process that owns it, which ends when we do",
            Self::Resolver => "putting it back, unless somebody else changed it meanwhile; journalled",
        }
    }

    /// Whether undoing says more than the change did.
    fn is_plain(self) -> bool {
        !matches!(self, Self::Parameters | Self::Resolver)
    }
}

impl HostPlan {
    /// The changes in the order in which they are made.
    #[must_use]
    pub fn outline(&self, before: &Before) -> Vec<Group> {
        let mut groups = vec![group(Part::Device)];
        groups[0].acts.push(format!("ip tuntap add dev {} mode tun multi_queue vnet_hdr", self.tun));
        groups[0].undo.push(format!("ip link delete dev {}", self.tun));
        let mut part = Part::Device;
        for step in self.steps() {
            let next = Part::of(&step, self);
            if next != part {
                groups.push(group(next));
                part = next;
            }
            let Some(group) = groups.last_mut() else { break };
            group.acts.extend(self.acts(&step));
            // What is undone goes from the last to the first.
            let mut undo = self.undo(&step);
            undo.append(&mut group.undo);
            group.undo = undo;
        }
        for group in &mut groups {
            let wanted = |undo: &&Undo| match undo {
                Undo::Sysctl { .. } => group.title == Part::Parameters.title(),
                Undo::ResolvConf { .. } => group.title == Part::Resolver.title(),
                _ => false,
            };
            let undo: Vec<String> = before.0.iter().rev().filter(wanted).map(put_back).collect();
            group.undo.extend(undo);
        }
        if self.has_kill_switch() {
            groups.iter_mut().for_each(outlive);
        }
        groups
    }

    fn acts(&self, step: &Step) -> Vec<String> {
        let tun = &self.tun;
        match step {
            Step::Sysctl(sysctl) => vec![format!("sysctl -w {}={}", parameter(&sysctl.path), sysctl.value)],
            Step::Address(address) => {
                let nodad = if address.addr().is_ipv6() { " nodad" } else { "" };
                vec![format!("ip address add {address} dev {tun} noprefixroute{nodad}")]
            }
            Step::Link => {
                let mut acts = Vec::new();
                if self.addresses.iter().any(|net| net.addr().is_ipv6()) {
                    acts.push(format!("ip link set dev {tun} addrgenmode none"));
                }
                acts.push(format!("ip link set dev {tun} mtu {} txqueuelen {QUEUE_LENGTH} up", self.mtu));
                acts
            }
            Step::Route(wanted) => vec![route("add", wanted)],
            Step::Rule(wanted) => vec![rule("add", wanted)],
            // No quote of this kind is in it: names of interfaces were checked.
            Step::Firewall => self.nft.iter().map(|nft| format!("nft '{}'", nft.text.trim_end())).collect(),
            Step::Resolver => match &self.dns {
                DnsPlan::Untouched => Vec::new(),
                DnsPlan::Resolved { servers } => {
                    let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
                    vec![
                        format!("resolvectl dns {tun} {}", servers.join(" ")),
                        format!("resolvectl domain {tun} '~.'"),
                        format!("resolvectl default-route {tun} yes"),
                    ]
                }
                DnsPlan::Rewrite { text, .. } => vec![write_file(resolv_conf::PATH, text)],
            },
        }
    }

    /// How a step is undone that overwrites nothing.
    fn undo(&self, step: &Step) -> Vec<String> {
        let tun = &self.tun;
        match step {
            Step::Sysctl(_) | Step::Link => Vec::new(),
            Step::Address(address) => vec![format!("ip address delete {address} dev {tun}")],
            Step::Route(wanted) => vec![route("delete", wanted)],
            Step::Rule(wanted) => vec![rule("delete", wanted)],
            Step::Firewall => {
                let families = ["inet", "arp"].into_iter();
                let tables = self.nft.iter().flat_map(|nft| {
                    let there = families.clone().filter(|family| nft.text.contains(&format!("table {family} ")));
                    there.map(|family| format!("nft delete table {family} {}", nft.table))
                });
                tables.collect()
            }
            Step::Resolver if matches!(self.dns, DnsPlan::Resolved { .. }) => vec![format!("resolvectl revert {tun}")],
            Step::Resolver => Vec::new(),
        }
    }
}

/// What a kill switch keeps when we are gone.
fn outlive(group: &mut Group) {
    if group.title == Part::Firewall.title() {
        group.undone_by = "deleting it, by its name and comment; journalled, since it outlives us";
    } else if group.title == Part::Routes.title() {
        group.undone_by = "deleting them; those to the TUN vanish with it, the others are journalled";
    }
}

fn group(part: Part) -> Group {
    let (title, undone_by, plain) = (part.title(), part.undone_by(), part.is_plain());
    Group { title, acts: Vec::new(), undone_by, undo: Vec::new(), plain }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        let listed = |f: &mut fmt::Formatter<'_>, indent: &str, lines: &[String]| {
            lines.iter().try_for_each(|act| act.lines().try_for_each(|line| writeln!(f, "{indent}{line}")))
        };
        listed(f, "    ", &self.acts)?;
        writeln!(f, "  undone by: {}", self.undone_by)?;
        if self.plain { Ok(()) } else { listed(f, "    ", &self.undo) }
    }
}

impl fmt::Display for HostPlan {
    /// Every change, in the order in which they are made.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, group) in self.outline(&Before::default()).iter().enumerate() {
            write!(f, "{}. {group}", number + 1)?;
        }
        match &self.dns {
            DnsPlan::Untouched => writeln!(f, "the resolver stays as it is"),
            DnsPlan::Rewrite { reason, .. } => writeln!(f, "the resolver has to change: {reason}"),
            DnsPlan::Resolved { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::HostOptions;
    use crate::platform::plan::tests::options;
    use crate::platform::survey::Survey;
    use crate::platform::survey::tests::plain;

    fn titles(options: &HostOptions, survey: &Survey) -> Vec<&'static str> {
        let plan = HostPlan::new(options, survey).unwrap();
        plan.outline(&Before::default()).iter().map(|group| group.title).collect()
    }

    #[test]
    fn changes_are_told_in_groups_in_the_order_in_which_they_are_made() {
        let quiet = [
            "the TUN device",
            "the TUN's own parameters",
            "the TUN's addresses and link",
            "routes in two tables of our own",
            "rules that are jump targets or let traffic pass",
            "the firewall table",
            "rules that capture",
        ];
        assert_eq!(titles(&options(), &plain()), quiet);
        let survey = Survey { resolv_conf: None, ..plain() };
        let busy = titles(&HostOptions { auto_forward: true, ..options() }, &survey);
        assert_eq!(busy[5..], ["parameters of the host", quiet[5], quiet[6], "the resolver"]);
        let bare = titles(&HostOptions { auto_route: false, ..options() }, &plain());
        assert_eq!(bare, quiet[..3]);
    }

    #[test]
    fn acts_are_what_a_person_would_type() {
        let shown = HostPlan::new(&options(), &plain()).unwrap().to_string();
        for line in [
            "    ip address add 198.18.0.1/30 dev tun7 noprefixroute\n",
            "    ip link set dev tun7 mtu 1500 txqueuelen 4096 up\n",
            "    ip -4 route add default dev tun7 scope global table 2022 metric 1024 congctl reno protocol kernel\n",
            "    ip -4 rule add priority 9005 to 198.18.0.0/15 lookup 2023 protocol kernel\n",
            "    ip -6 rule add priority 9025 ipproto udp dport 53 lookup 2023 protocol kernel\n",
            "    nft 'create table inet tunproxy { flags owner; };\n",
            "the resolver stays as it is\n",
        ] {
            assert!(shown.contains(line), "{line} in {shown}");
        }
    }

    #[test]
    fn undoing_goes_from_the_last_to_the_first() {
        let groups = HostPlan::new(&options(), &plain()).unwrap().outline(&Before::default());
        let rules = groups.iter().find(|group| group.title == "rules that capture").unwrap();
        let reversed: Vec<String> = rules.acts.iter().rev().map(|act| act.replace("rule add", "rule delete")).collect();
        assert_eq!(rules.undo, reversed);
    }

    #[test]
    fn what_is_overwritten_is_told_with_its_old_value() {
        let survey = Survey { resolv_conf: None, ..plain() };
        let plan = HostPlan::new(&HostOptions { auto_forward: true, ..options() }, &survey).unwrap();
        let sysctl = |path: &str, old: &str| Undo::Sysctl { path: path.to_owned(), ours: None, old: old.to_owned() };
        let before = Before(vec![
            sysctl("net/ipv4/conf/eth0.7/forwarding", "0"),
            sysctl("net/ipv4/ip_forward", "0"),
            Undo::ResolvConf {
                path: "/etc/resolv.conf".into(),
                ours: String::new(),
                old: super::super::undo::OldFile::Link("../run/stub".to_owned()),
            },
        ]);
        let groups = plan.outline(&before);
        let undo = |title: &str| groups.iter().find(|group| group.title == title).unwrap().undo.clone();
        let set = ["sysctl -w net.ipv4.ip_forward=0", "sysctl -w net/ipv4/conf/eth0.7/forwarding=0"];
        assert_eq!(undo("parameters of the host"), set);
        assert_eq!(undo("the resolver"), ["ln --symbolic --force --no-dereference ../run/stub /etc/resolv.conf"]);
    }
}
