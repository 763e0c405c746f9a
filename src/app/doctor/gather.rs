//! Looking at the host for the checks. Reads only.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, access, geteuid};

use super::super::build;
use super::super::control::{Command, ask};
use super::super::limits;
use super::super::load::Loaded;
use super::super::nameservers::{open_resolver, stub_in_words};
use super::super::places::hides_from_us;
use super::super::plan;
use super::super::refusal::{NODE, closed};
use super::super::run::{Run, workers_wanted};
use super::checks::{NAMESPACES, OF_TUN, TRACKED, TRACKED_AT_MOST};
use super::probe;
use super::record::{
    Firewall, Journal, Probes, Record, ResolvConf, Resolver, Rights, RunState, Start, StateDir, System, Unusable,
    Wanted,
};
use crate::dns;
use crate::net::Name;
use crate::platform::{
    self, Condition, Family, HostPlan, JournalError, Journalled, KillSwitch, Netlink, NftState, Survey, condition,
    firewall_rules, holder, lost_by, may_administer_network, nft_program, parameters_are_read_only,
    program_may_administer_network, read_parameter,
};
use crate::profile::Profile;

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Gathers all but what answers on the network. What could not be looked at is added to `unseen`, in words.
///
/// # Errors
/// The kernel does not answer.
pub(super) fn host(
    loaded: Option<&Loaded>,
    state: &Path,
    again: &str,
    unseen: &mut Vec<String>,
) -> anyhow::Result<Record> {
    // First, since a run that is about to start answers when all is in place.
    let run = run_state(state, again, unseen);
    let survey = Survey::take()?;
    let mut netlink = Netlink::open()?;
    let links = netlink.seen_links()?;
    let plan = match &run {
        RunState::Answers { plan, .. } => plan.as_deref(),
        RunState::Absent | RunState::Silent(_) | RunState::Suspended(_) | RunState::Lost(_) | RunState::Hidden => None,
    };
    let our_routes = match plan {
        Some(plan) => {
            let tables = [plan.numbers.captured, plan.numbers.always];
            let of = |family| netlink.routes(family, |seen| tables.contains(&seen.table));
            Family::BOTH.into_iter().map(of).collect::<Result<Vec<_>, _>>()?.concat()
        }
        None => Vec::new(),
    };
    let mut parameters = BTreeMap::new();
    // A TUN that is to be made gets what stands there.
    let of_new = OF_TUN.iter().map(|key| format!("net/ipv4/conf/default/{key}"));
    let of_links = links.iter().map(|link| format!("net/ipv4/conf/{}/src_valid_mark", link.name));
    let of_plan = plan.iter().flat_map(|plan| plan.sysctls.iter().map(|it| it.path.clone()));
    let of_tracking = [TRACKED, TRACKED_AT_MOST].into_iter().map(str::to_owned);
    for path in NAMESPACES
        .iter()
        .map(|(path, ..)| (*path).to_owned())
        .chain(of_links)
        .chain(of_new)
        .chain(of_plan)
        .chain(of_tracking)
    {
        if let Ok(value) = read_parameter(&path) {
            parameters.insert(path, value);
        }
    }
    let network = may_administer_network();
    if !network && matches!(survey.nft, NftState::Missing(_)) && nft_program().is_some() {
        unseen.push(format!("the firewall, for want of CAP_NET_ADMIN: root may look ({again})"));
    }
    Ok(Record {
        journal: journal(state, unseen),
        our_routes,
        parameters,
        resolver: Resolver { resolv_conf: resolv_conf(), hosts: hosts() },
        firewall: Firewall {
            installed: nft_program().is_some(),
            ruleset: firewall_rules(),
            closed: KillSwitch::all().unwrap_or_default(),
        },
        rights: Rights {
            network,
            by_file: program_may_administer_network(),
            node: Path::new(NODE).exists(),
            node_closed: closed(Path::new(NODE)),
        },
        system: system(&run, state, unseen),
        profile: loaded.map(wanted),
        start: start(loaded, state, &run, &survey),
        read_only: parameters_are_read_only(),
        probes: Probes::default(),
        run,
        survey,
        links,
    })
}

/// Asks the run that has the state directory.
fn run_state(state: &Path, again: &str, unseen: &mut Vec<String>) -> RunState {
    match ask(state, Command::Status) {
        Ok(status) if status.get("error").is_none() => {
            let number = |key: &str| status.get(key).and_then(serde_json::Value::as_u64).unwrap_or_default();
            let plan = match plan::in_force(state) {
                Some(Ok(plan)) => plan,
                Some(Err(error)) => {
                    unseen.push(format!("what the run has changed: {error:#}"));
                    None
                }
                None => None,
            };
            let looped = status.pointer("/dns/looped").and_then(serde_json::Value::as_u64).unwrap_or_default();
            let (pid, seconds) = (number("pid"), number("uptime_seconds"));
            RunState::Answers { pid, seconds, looped, plan: plan.map(Box::new) }
        }
        answer => {
            let forbidden = |error: &anyhow::Error| {
                let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
                kind == Some(io::ErrorKind::PermissionDenied)
            };
            if !answer.as_ref().is_err_and(|error| !forbidden(error)) {
                unseen.push(format!("the run with the state directory {}: ask as its user, or root", state.display()));
                return RunState::Hidden;
            }
            if let Some(pid) = holder(state) {
                return match condition(pid) {
                    Condition::Suspended => RunState::Suspended(pid),
                    Condition::Gone | Condition::Dying | Condition::Alive => RunState::Silent(pid),
                };
            }
            if let Some(pid) = lost_by(state) {
                return RunState::Lost(pid);
            }
            if hides_from_us(state) {
                unseen.push(format!("a tunproxy that root runs, or what it has left: root sees it ({again})"));
                return RunState::Hidden;
            }
            RunState::Absent
        }
    }
}

fn journal(state: &Path, unseen: &mut Vec<String>) -> Result<Option<Journal>, Unusable> {
    let journal = match Journalled::read(state) {
        Ok(journal) => journal,
        Err(JournalError::Io { path, source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied && !geteuid().is_root() =>
        {
            let owner = fs::symlink_metadata(&path).map(|found| found.uid());
            let why = match owner {
                Ok(owner) if owner == geteuid().as_raw() => "this user's own, and its mode forbids reading".to_owned(),
                Ok(owner) => format!("another user's (uid {owner})"),
                Err(_) => "in a directory that is closed to this user".to_owned(),
            };
            unseen.push(format!("what an earlier run may have left: {} is {why}", path.display()));
            return Ok(None);
        }
        Err(error) => return Err(Unusable { what: error.what(), advice: error.advice() }),
    };
    let elsewhere = journal.is_of_elsewhere() && !journal.is_empty();
    Ok(Some(Journal {
        commands: journal.commands(),
        elsewhere,
        rules: journal.rules().cloned().collect(),
        kill_switch: journal.kill_switch().map(str::to_owned),
        opened: journal.opened().is_some(),
    }))
}

fn resolv_conf() -> ResolvConf {
    match fs::read_to_string(RESOLV_CONF) {
        Ok(text) => ResolvConf::Text(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(RESOLV_CONF) {
            Ok(target) => ResolvConf::Dangling(target.display().to_string()),
            Err(_) => ResolvConf::Missing,
        },
        Err(error) => ResolvConf::Unreadable(error.to_string()),
    }
}

/// The sources of `hosts:` (nsswitch.conf(5)).
fn hosts() -> Vec<String> {
    let text = fs::read_to_string("/etc/nsswitch.conf").unwrap_or_default();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("hosts:"));
    line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn system(run: &RunState, state: &Path, unseen: &mut Vec<String>) -> System {
    let built = std::env::current_exe().and_then(fs::metadata).and_then(|file| file.modified()).ok();
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
    let kernel = read_parameter("kernel/osrelease").unwrap_or_default();
    let open = match run {
        RunState::Answers { pid, .. } => open_files(*pid),
        RunState::Absent | RunState::Silent(_) | RunState::Suspended(_) | RunState::Lost(_) | RunState::Hidden => None,
    };
    System { now: SystemTime::now(), built, kernel, descriptors, open, state: state_dir(state, unseen) }
}

/// How many files a process has open and how many it may, as proc(5) tells its user and root.
fn open_files(pid: u64) -> Option<(u64, u64)> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?.split_whitespace().next()?;
    Some((u64::try_from(open).ok()?, limit.parse().ok()?))
}

/// A run makes the directory if it is missing: then its first ancestor that is there counts.
fn state_dir(state: &Path, unseen: &mut Vec<String>) -> StateDir {
    let there: PathBuf = state.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned();
    let (closed, hidden) = match access(&there, AccessFlags::W_OK) {
        Ok(()) => (None, false),
        Err(nix::errno::Errno::EACCES) if !geteuid().is_root() => {
            unseen.push(format!(
                "whether a run could write to {}: {} is another user's",
                state.display(),
                there.display()
            ));
            (None, true)
        }
        Err(error) => (Some(error.desc().to_owned()), false),
    };
    let free = nix::sys::statvfs::statvfs(&there).map_or(u64::MAX, |it| it.blocks_available() * it.fragment_size());
    let distrusted = platform::Journal::open_to_others(state);
    StateDir { path: state.display().to_string(), closed, hidden, distrusted, free }
}

/// What a start would come to where no run is. A profile with errors says so by itself.
fn start(loaded: Option<&Loaded>, state: &Path, run: &RunState, survey: &Survey) -> Option<Start> {
    let profile = loaded.filter(|it| !it.report.has_errors())?.profile.as_ref()?;
    if !matches!(run, RunState::Absent) || !profile.tun.enable {
        return None;
    }
    let run = Run { profile, state };
    let options = run.options(run.device_name());
    let mut survey = survey.clone().without(&Journalled::read(state).unwrap_or_default());
    // Who may not look at the firewall is told so elsewhere.
    plan::assume_a_firewall(&mut survey, &mut Vec::new(), "");
    survey.foresee_ipv6();
    let refused = HostPlan::may_start(&options, &survey).err().map(|error| error.to_string());
    let plan = HostPlan::new(&options, &survey).ok().map(Box::new);
    let limited = limits::refuses_a_start(workers_wanted());
    let refused = limited.into_iter().chain(refused).collect();
    Some(Start { refused, stub: stub_in_words(profile), plan })
}

/// The ports of `profile` that somebody else serves. Only those that are listened on already are tried.
pub(super) fn ports_in_use(profile: &Profile, state: &Path, survey: &Survey) -> Vec<String> {
    let listen = &profile.listen;
    let ports = [listen.port, listen.socks_port, listen.mixed_port];
    let mut found = Vec::new();
    if ports.into_iter().flatten().any(|port| survey.listening.contains(&port.get())) {
        found.extend(Run { profile, state }.listeners().err().map(|error| format!("{error:#}")));
    }
    let dns = profile.dns.listen.filter(|_| profile.dns.enable);
    found.extend(
        dns.filter(|at| serves_names(survey, *at))
            .map(|at| format!("dns.listen: cannot listen on {at}; is another DNS server there?")),
    );
    found
}

/// Whether somebody has the UDP or the TCP port `at`.
fn serves_names(survey: &Survey, at: SocketAddr) -> bool {
    let taken = |bound: io::Result<()>| bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse);
    let (udp, tcp) = (survey.unconnected.contains(&at.port()), survey.listening.contains(&at.port()));
    (udp && taken(UdpSocket::bind(at).map(drop))) || (tcp && taken(TcpListener::bind(at).map(drop)))
}

fn wanted(loaded: &Loaded) -> Wanted {
    let report = &loaded.report;
    let errors = report.errors().map(|error| {
        let (at, file) = (error.place.at, report.file());
        // Line 0 is the file as a whole.
        let place = if at.line == 0 { file.to_owned() } else { format!("{file}:{}:{}", at.line, at.column) };
        let path = if error.path.is_empty() { String::new() } else { format!(" {}:", error.path) };
        format!("{place}:{path} {}", error.message)
    });
    let errors: Vec<String> = errors.collect();
    let warnings = report.warnings().count();
    let Some(profile) = &loaded.profile else { return Wanted { errors, warnings, ..Wanted::default() } };
    let run = Run { profile, state: Path::new("") };
    Wanted {
        errors,
        warnings,
        tun: profile.tun.enable,
        device: run.device_name().to_owned(),
        gateway: run.is_gateway(),
        auto_forward: profile.tun.auto_forward,
        fake_ip: fakes(profile) && asks_us(profile),
        open_resolver: profile.dns.listen.filter(|_| profile.dns.enable).and_then(open_resolver),
        interfaces: interfaces(profile),
    }
}

/// The interfaces that `profile` takes or leaves out, each with its key.
fn interfaces(profile: &Profile) -> Vec<(&'static str, String)> {
    let selection = profile.tun.enable.then_some(&profile.tun.selection);
    let named = |key, list: &[String]| list.iter().map(|name| (key, name.clone())).collect::<Vec<_>>();
    let both = selection.filter(|_| profile.tun.auto_route).map(|it| {
        [named("include-interface", &it.include_interface), named("exclude-interface", &it.exclude_interface)].concat()
    });
    both.unwrap_or_default()
}

/// Whether the profile takes what this user asks: who is left out asks on his own.
fn asks_us(profile: &Profile) -> bool {
    let (selection, uid) = (&profile.tun.selection, nix::unistd::geteuid().as_raw());
    let named = |list: &[(u32, u32)]| list.iter().any(|(first, last)| (*first..=*last).contains(&uid));
    let included = selection.include_uid.is_empty() || named(&selection.include_uid);
    selection.takes_own_traffic() && included && !named(&selection.exclude_uid)
}

/// Whether the name that is asked for gets a fake address.
fn fakes(profile: &Profile) -> bool {
    let asked = Name::new(probe::NAME);
    matches!((build::mode(profile), asked), (Ok(dns::Mode::FakeIp { filter, .. }), Ok(name)) if filter.fakes(name.as_str()))
}

/// Whether a plan takes questions to port 53.
pub(super) fn hijacks(plan: &HostPlan) -> bool {
    plan.rules.iter().any(|rule| rule.destination_ports.is_some_and(|ports| ports.first == 53))
}
