//! What was gathered of a host, as plain data: the checks look at nothing else.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use ipnet::IpNet;

use crate::platform::{
    DirectWay, Family, Gate, Gateway, Hook, HostPlan, KillSwitch, NftState, Rule, RuleAction, SeenLink, SeenRoute,
    Survey,
};

/// A host at one moment.
#[derive(Debug, Clone)]
pub(super) struct Record {
    /// The run that has the state directory.
    pub(super) run: RunState,
    /// What an earlier run left; of a run that goes on, what it would undo. `None`: this user may not look.
    pub(super) journal: Result<Option<Journal>, Unusable>,
    /// Links, rules, routes, addresses, parameters, firewall in short.
    pub(super) survey: Survey,
    /// The interfaces as they are.
    pub(super) links: Vec<SeenLink>,
    /// The routes in the tables of the plan in force.
    pub(super) our_routes: Vec<SeenRoute>,
    /// Kernel parameters by their paths below /proc/sys, as far as some check asks for them and they exist.
    pub(super) parameters: BTreeMap<String, String>,
    pub(super) resolver: Resolver,
    pub(super) firewall: Firewall,
    pub(super) rights: Rights,
    pub(super) system: System,
    /// What the profile wants; `None` where none was given.
    pub(super) profile: Option<Wanted>,
    /// What a start of the profile would come to; `None` where a run is there, and for a profile without a TUN.
    pub(super) start: Option<Start>,
    /// /proc/sys takes no writing.
    pub(super) read_only: bool,
    /// What answered on the network.
    pub(super) probes: Probes,
}

/// The run that has the state directory.
#[derive(Debug, Clone)]
pub(super) enum RunState {
    /// There is none.
    Absent,
    /// It answers.
    Answers {
        /// Its process.
        pid: u64,
        /// For how long it runs, in seconds.
        seconds: u64,
        /// How many answers of nameservers bore its own fake addresses.
        looped: u64,
        /// What it has changed.
        plan: Option<Box<HostPlan>>,
    },
    /// A process holds the state directory and does not answer.
    Silent(i32),
    /// The same, since a signal has stopped it.
    Suspended(i32),
    /// Its process goes on, and its state directory was deleted.
    Lost(i32),
    /// This user may not ask, so that there may be one.
    Hidden,
}

/// A journal that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unusable {
    pub(super) what: String,
    pub(super) advice: String,
}

/// A journal in short.
#[derive(Debug, Clone, Default)]
pub(super) struct Journal {
    /// What would undo what it names.
    pub(super) commands: Vec<String>,
    /// The changes were made in another network namespace.
    pub(super) elsewhere: bool,
    /// The rules it names.
    pub(super) rules: Vec<Rule>,
    /// The firewall table of the kill switch that it says is closed.
    pub(super) kill_switch: Option<String>,
    /// That table is gone, or lacks rules.
    pub(super) opened: bool,
}

/// What a start would come to.
#[derive(Debug, Clone, Default)]
pub(super) struct Start {
    /// Why it would end without changing anything.
    pub(super) refused: Vec<String>,
    /// That a program on this host is the system's nameserver, and how names are looked up then.
    pub(super) stub: Option<String>,
    /// What it would change, if there can be a plan.
    pub(super) plan: Option<Box<HostPlan>>,
}

/// What programs ask for names.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    pub(super) resolv_conf: ResolvConf,
    /// The sources of `hosts:` in nsswitch.conf, in their order.
    pub(super) hosts: Vec<String>,
}

/// /etc/resolv.conf.
#[derive(Debug, Clone)]
pub(super) enum ResolvConf {
    Missing,
    /// A link to nothing.
    Dangling(String),
    /// It may not be read, or is no text.
    Unreadable(String),
    Text(String),
}

#[derive(Debug, Clone)]
pub(super) struct Firewall {
    /// nft is installed.
    pub(super) installed: bool,
    /// The rules in force, or why they are not to be seen.
    pub(super) ruleset: Result<String, String>,
    /// The kill switches in force.
    pub(super) closed: Vec<KillSwitch>,
}

/// What this user, or this program, may do.
#[derive(Debug, Clone)]
pub(super) struct Rights {
    /// This process has CAP_NET_ADMIN.
    pub(super) network: bool,
    /// The program's file gives it.
    pub(super) by_file: bool,
    /// /dev/net/tun is there.
    pub(super) node: bool,
    /// Why it does not open.
    pub(super) node_closed: Option<String>,
}

#[derive(Debug, Clone)]
pub(super) struct System {
    pub(super) now: SystemTime,
    /// When the program's file was written.
    pub(super) built: Option<SystemTime>,
    /// `uname -r`.
    pub(super) kernel: String,
    /// RLIMIT_NOFILE, the hard one.
    pub(super) descriptors: u64,
    /// How many files the run has open, and how many it may.
    pub(super) open: Option<(u64, u64)>,
    pub(super) state: StateDir,
}

#[derive(Debug, Clone)]
pub(super) struct StateDir {
    pub(super) path: String,
    /// Why nothing can be written there.
    pub(super) closed: Option<String>,
    /// It is another user's, so that nobody knows.
    pub(super) hidden: bool,
    /// Why others can interfere with it, and what to do.
    pub(super) distrusted: Option<(String, String)>,
    /// Bytes that are free.
    pub(super) free: u64,
}

/// What a profile wants of the host.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    /// Its errors, one line each.
    pub(super) errors: Vec<String>,
    /// How many warnings `check` has for it.
    pub(super) warnings: usize,
    pub(super) tun: bool,
    /// The name of its TUN.
    pub(super) device: String,
    /// Other hosts are to come through this one.
    pub(super) gateway: bool,
    pub(super) auto_forward: bool,
    /// Names get fake addresses.
    pub(super) fake_ip: bool,
    /// What comes of answering names at every address, and what to do, if it does.
    pub(super) open_resolver: Option<(String, String)>,
    /// The interfaces that are taken or left out, each with its key of `tun`.
    pub(super) interfaces: Vec<(&'static str, String)>,
}

/// What answered on the network.
#[derive(Debug, Clone, Default)]
pub(super) struct Probes {
    /// A question asked as programs do: whom, and the addresses that came back. Only while a run answers names.
    pub(super) question: Option<(SocketAddr, Result<Vec<IpAddr>, String>)>,
    /// The nameservers that a run asks, asked past it.
    pub(super) nameservers: Vec<(String, Result<Heard, String>)>,
    /// Those of them, asked for sure, that answered with a fake address of the run.
    pub(super) looped: Vec<String>,
    /// Those in resolv.conf that are not among them. Only while no run answers in their place.
    pub(super) listed: Vec<(String, Result<Heard, String>)>,
    /// For each family whether the kernel has a way to an address of the internet, past a run. Nothing was sent there.
    pub(super) routed: Vec<(Family, bool)>,
    /// The gateways of the default routes.
    pub(super) gateways: Vec<Probed>,
    /// Those ways of default routes that have none: there is nobody to ask.
    pub(super) direct: Vec<DirectWay>,
    /// The proxy servers of the profile, connected to past the run.
    pub(super) servers: Vec<Server>,
    /// Probes could not be sent past the run, and were left out.
    pub(super) captured: bool,
}

/// What a nameserver that is there has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Heard {
    /// An answer, with these addresses.
    Answer(Vec<IpAddr>),
    /// That it has none, by this code.
    Refusal(&'static str),
    /// Nothing of the internet, but something of its own.
    OfItsOwn,
}

/// A gateway and whether it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probed {
    pub(super) gateway: Gateway,
    /// `None`: nobody could tell in the time there was.
    pub(super) answers: Option<bool>,
}

/// A proxy's server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    /// The proxy's name and the server's address.
    pub(super) shown: String,
    /// Where the profile has it: `FILE:LINE`.
    pub(super) place: String,
    /// Some rule sends flows there as things stand.
    pub(super) used: bool,
    /// The address is reserved for examples (RFC 2606, RFC 3849, RFC 5737), so that nobody has it.
    pub(super) example: bool,
    /// Whether it takes connections.
    pub(super) outcome: Result<(), String>,
}

impl Record {
    /// The plan in force.
    pub(super) fn plan(&self) -> Option<&HostPlan> {
        match &self.run {
            RunState::Answers { plan, .. } => plan.as_deref(),
            RunState::Absent | RunState::Silent(_) | RunState::Suspended(_) | RunState::Lost(_) | RunState::Hidden => {
                None
            }
        }
    }

    /// How many answers of nameservers bore fake addresses of the run.
    pub(super) fn looped(&self) -> u64 {
        match &self.run {
            RunState::Answers { looped, .. } => *looped,
            RunState::Absent | RunState::Silent(_) | RunState::Suspended(_) | RunState::Lost(_) | RunState::Hidden => 0,
        }
    }

    /// The plan in force, or the one that a start would make.
    pub(super) fn plan_or_start(&self) -> Option<&HostPlan> {
        self.plan().or_else(|| self.start.as_ref()?.plan.as_deref())
    }

    /// Interfaces by which a family leaves, the TUN left out.
    pub(super) fn ways(&self, family: Family) -> Vec<&SeenLink> {
        let of_family = |route: &&SeenRoute| is_wide(&route.to) && Family::of(&route.to) == family;
        let devices: Vec<u32> = self.survey.routes.iter().filter(of_family).filter_map(|route| route.device).collect();
        self.uplinks().into_iter().filter(|link| devices.contains(&link.index)).collect()
    }

    /// Rules that are not ours.
    pub(super) fn foreign_rules(&self) -> impl Iterator<Item = &Rule> {
        let ours = self.plan().map_or(&[][..], |plan| &plan.rules);
        let left = self.journal.as_ref().ok().and_then(Option::as_ref).map_or(&[][..], |journal| &journal.rules);
        self.survey.rules.iter().filter(move |rule| !ours.contains(rule) && !left.contains(rule))
    }

    /// Interfaces that lead to the internet, the TUN left out, and that of a run that this user cannot see.
    pub(super) fn uplinks(&self) -> Vec<&SeenLink> {
        let tun = self.plan().map(|plan| plan.tun.as_str());
        let up = self.survey.uplinks();
        let ours =
            |link: &SeenLink| Some(link.name.as_str()) == tun || (link.kind == "tun" && is_default_name(&link.name));
        self.links.iter().filter(|link| up.contains(&link.index) && !ours(link)).collect()
    }

    /// The chains of others that stop whatever comes to this host, or all that it sends, by an uplink, each with that.
    pub(super) fn gates_of_uplinks(&self) -> Vec<(&Gate, &SeenLink)> {
        let NftState::Present { gates, .. } = &self.survey.nft else { return Vec::new() };
        let uplinks = self.uplinks();
        let stopped = |gate: &Gate, link: &SeenLink| gate.stops(&link.name, Some(link.index));
        let of = |gate| uplinks.iter().filter(move |link| stopped(gate, link)).map(move |link| (gate, *link));
        gates.iter().flat_map(of).collect()
    }

    /// The chain that keeps all uplinks from being heard over IPv4.
    pub(super) fn deaf(&self) -> Option<&Gate> {
        let (stopped, uplinks) = (self.gates_of_uplinks(), self.uplinks());
        let by = |link: &&SeenLink| {
            let of_link = stopped.iter().filter(|(gate, at)| gate.hook == Hook::Input && at.index == link.index);
            of_link.map(|(gate, _)| *gate).find(|gate| gate.concerns(Family::V4))
        };
        let each: Option<Vec<&Gate>> = uplinks.iter().copied().map(|link| by(&link)).collect();
        each?.first().copied()
    }

    /// Whether there is a way to the internet besides the TUN.
    pub(super) fn has_default(&self, family: Family) -> bool {
        !self.ways(family).is_empty()
    }

    /// Whether a rule sends what it selects to an internet of its own: its table has a route for everything.
    pub(super) fn leads_out(&self, rule: &Rule) -> Option<&SeenRoute> {
        let RuleAction::Lookup(table) = rule.action else { return None };
        let fits =
            |route: &&SeenRoute| route.table == table && is_wide(&route.to) && Family::of(&route.to) == rule.family;
        self.survey.routes.iter().find(fits)
    }

    /// A kernel parameter that was asked for and exists.
    pub(super) fn parameter(&self, path: &str) -> Option<&str> {
        self.parameters.get(path).map(String::as_str)
    }

    /// Whether others are meant to come through this host, as far as is known.
    pub(super) fn is_gateway(&self) -> bool {
        self.profile.as_ref().is_some_and(|profile| profile.gateway)
    }
}

/// Whether a TUN with this name is one of ours, as far as a name tells.
pub(super) fn is_default_name(name: &str) -> bool {
    name.starts_with("tunproxy")
}

/// Whether a prefix is all of its family, or half of it.
pub(super) fn is_wide(prefix: &IpNet) -> bool {
    prefix.prefix_len() <= 1 || (prefix.addr().is_ipv6() && prefix.prefix_len() <= 3)
}
