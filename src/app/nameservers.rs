//! Whom to ask: the profile's nameservers as places where they are found.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::build::Addresses;
use crate::dns::{self, Dns, Source, Tracers, Upstream};
use crate::net::{Address, Host, Lookup};
use crate::platform::{self, Dialer, Fwmark};
use crate::profile::{Nameserver, Profile};

/// What programs on this host ask.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Where those who put a stub on a loopback address into it keep the nameservers behind that stub: systemd-resolved,
/// NetworkManager, and resolvconf for dnsmasq.
const BEHIND_STUBS: [&str; 3] =
    ["/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf", "/run/dnsmasq/resolv.conf"];
const PORT: u16 = 53;
/// A run has one; which, makes no difference here.
const ANY_MARK: Fwmark = Fwmark(1);
/// For so long the system's files are taken to be as they were.
const FRESH: Duration = Duration::from_secs(1);

/// What to do about a nameserver that can only ask us.
pub(super) const NAME_OTHERS: &str =
    "Write the nameservers behind it under `dns.nameserver`, as in `nameserver: [9.9.9.9]`";

/// What a run of `profile` says of the program on this host that is all the system has for a nameserver, if that is so and
/// its questions come to us.
pub(super) fn stub_in_words(profile: &Profile) -> Option<String> {
    let only_system = profile.dns.nameserver.iter().all(|server| *server == Nameserver::System);
    if profile.dns.enable && !only_system {
        return None;
    }
    let addresses = Addresses::of(profile);
    let dialer = Dialer { mark: Some(ANY_MARK), fake: addresses.fake.clone(), ..Dialer::default() };
    let system = FromSystem::new(profile, &addresses, &dialer);
    system.stub_among(&dns::System::nameservers(&system).ok()?)
}

/// Those that are not on a loopback address.
fn away(servers: &[SocketAddr]) -> Vec<SocketAddr> {
    servers.iter().copied().filter(|server| !is_loopback(server.ip())).collect()
}

/// Where the nameservers of `profile` are found. Nothing is asked yet: those written as names are looked up through
/// `default-nameserver` when a question needs them, and the system's are those of that time.
///
/// `tracers` are those of the service that asks them: what a stub asks for such a look-up comes to it.
///
/// # Errors
/// The look-up of names cannot be built.
pub(super) fn find(
    profile: &Profile,
    addresses: &Addresses,
    dialer: &Dialer,
    tracers: &Arc<Tracers>,
) -> anyhow::Result<Vec<Source>> {
    let written = &profile.dns;
    let system = Arc::new(FromSystem::new(profile, addresses, dialer));
    if !written.enable {
        system.warn();
        return Ok(vec![Source::System(system)]);
    }
    let bootstrap = match written.nameserver.iter().any(Nameserver::is_named) {
        true => Some(bootstrap(profile, &system, dialer, tracers)?),
        false => None,
    };
    let mut sources: Vec<Source> =
        written.nameserver.iter().filter_map(|server| source(server, &system, bootstrap.as_ref())).collect();
    let asks_system = |servers: &[Nameserver]| servers.contains(&Nameserver::System);
    if asks_system(&written.nameserver) || bootstrap.is_some() && asks_system(&written.default_nameserver) {
        system.warn();
    }
    // Nobody else may be asked in place of those that the profile names.
    if !written.nameserver_chosen && dns::System::nameservers(&*system).is_err() {
        tracing::warn!("the profile has no dns.nameserver and the system has none: asking dns.default-nameserver");
        sources.extend(written.default_nameserver.iter().filter_map(|server| source(server, &system, None)));
    }
    Ok(sources)
}

fn source(server: &Nameserver, system: &Arc<FromSystem>, lookup: Option<&Arc<dyn Lookup>>) -> Option<Source> {
    let (Address { host, port }, tcp_only) = match server {
        Nameserver::System => return Some(Source::System(Arc::clone(system) as Arc<dyn dns::System>)),
        Nameserver::Udp(address) => (address, false),
        Nameserver::Tcp(address) => (address, true),
    };
    let source = match host {
        Host::Ip(ip) => Source::Fixed(Upstream { address: SocketAddr::new(*ip, *port), tcp_only }),
        Host::Name(name) => Source::Named { name: name.clone(), port: *port, tcp_only, lookup: Arc::clone(lookup?) },
    };
    // Whether it is on this host shows when it is asked: addresses come and go.
    Some(match system.captured {
        true => Source::Checked(Box::new(source), Arc::clone(system) as Arc<dyn dns::System>),
        false => source,
    })
}

/// Finds the addresses of nameservers that are written as names. It has a cache and limits of its own.
fn bootstrap(
    profile: &Profile,
    system: &Arc<FromSystem>,
    dialer: &Dialer,
    tracers: &Arc<Tracers>,
) -> anyhow::Result<Arc<dyn Lookup>> {
    let servers = &profile.dns.default_nameserver;
    let dns = Dns::open(dns::Config {
        ipv6: profile.ipv6,
        mode: dns::Mode::Mapping,
        nameservers: servers.iter().filter_map(|server| source(server, system, None)).collect(),
        tracers: Arc::clone(tracers),
        dialer: dialer.clone(),
        log: None,
        runtime: Handle::current(),
    })?;
    Ok(Arc::new(dns))
}

/// The nameservers of this host, as far as asking them leads away from us.
struct FromSystem {
    /// Addresses that are our own.
    own: Vec<IpNet>,
    /// Where we answer ourselves.
    listen: Option<SocketAddr>,
    /// Whether questions that leave this host come to us: then those of a stub do.
    captured: bool,
    resolv_conf: PathBuf,
    behind_stubs: Vec<PathBuf>,
    known: Mutex<Option<Known>>,
}

struct Known {
    at: Instant,
    found: Result<Vec<SocketAddr>, String>,
}

impl dns::System for FromSystem {
    /// Those of the files as they are now or were at most [`FRESH`] ago. While they name nobody whom we could ask, for
    /// instance because we are all that stands there, those that were there before remain.
    fn nameservers(&self) -> Result<Vec<SocketAddr>, String> {
        let mut known = self.known.lock();
        let now = Instant::now();
        match &mut *known {
            Some(Known { at, found }) if now.saturating_duration_since(*at) < FRESH => found.clone(),
            Some(Known { at, found }) => {
                *at = now;
                let read = self.read();
                if read.is_ok() || found.is_err() {
                    *found = read;
                }
                found.clone()
            }
            None => known.insert(Known { at: now, found: self.read() }).found.clone(),
        }
    }

    /// An address of this host is enough: one whose questions do not come to us loses nothing by being asked like a stub.
    fn is_stub(&self, server: SocketAddr) -> bool {
        self.captured && is_here(server)
    }
}

impl FromSystem {
    fn new(profile: &Profile, addresses: &Addresses, dialer: &Dialer) -> Self {
        let tun = &profile.tun;
        // Without a mark of ours nothing of this host is captured: a private namespace is.
        let hijacks = tun.dns_hijack.iter().any(|target| target.port == PORT);
        // Around a private namespace our addresses are not ours alone: another run may answer the host's names there.
        let own = if dialer.fake.is_empty() { Vec::new() } else { [&addresses.device[..], &addresses.fake].concat() };
        Self {
            own,
            listen: profile.dns.listen,
            captured: dialer.mark.is_some()
                && tun.enable
                && tun.auto_route
                && hijacks
                && tun.selection.takes_own_traffic(),
            resolv_conf: RESOLV_CONF.into(),
            behind_stubs: BEHIND_STUBS.map(PathBuf::from).into(),
            known: Mutex::new(None),
        }
    }

    /// Says once, at the start, what will not work, or works in another way than one might think.
    fn warn(&self) {
        match dns::System::nameservers(self) {
            Err(why) => tracing::warn!("{why}; names are not found until it does, or write dns.nameserver"),
            Ok(found) => {
                if let Some(words) = self.stub_among(&found) {
                    tracing::info!("{words}");
                }
            }
        }
    }

    /// How names are looked up where stubs are all that can be asked.
    fn stub_among(&self, found: &[SocketAddr]) -> Option<String> {
        let stub = found.first().filter(|_| self.are_stubs(found))?;
        Some(format!(
            "the system's nameserver is a program on this host ({}), and its own questions come to us: what it does not know \
             by itself, tunproxy asks those whom it asks",
            stub.ip()
        ))
    }

    fn read(&self) -> Result<Vec<SocketAddr>, String> {
        let listed = self.listed(&self.resolv_conf);
        let behind = || self.behind_stubs.iter().map(|path| away(&self.listed(path))).find(|found| !found.is_empty());
        let found = match away(&listed) {
            _ if !self.captured || listed.is_empty() => listed,
            others if others.is_empty() => behind().unwrap_or(listed),
            // It may be one that others ask too, and whom they ask is written nowhere.
            others if self.are_stubs(&others) => listed,
            others => others,
        };
        if found.is_empty() {
            return Err(format!("{} names no nameserver that could be asked", self.resolv_conf.display()));
        }
        Ok(found)
    }

    fn are_stubs(&self, servers: &[SocketAddr]) -> bool {
        servers.iter().all(|server| dns::System::is_stub(self, *server))
    }

    fn listed(&self, path: &Path) -> Vec<SocketAddr> {
        let text = fs::read_to_string(path).unwrap_or_default();
        platform::nameservers(&text).into_iter().filter_map(address).filter(|server| !self.is_own(*server)).collect()
    }

    fn is_own(&self, server: SocketAddr) -> bool {
        let ip = server.ip();
        let listens = self.listen.is_some_and(|listen| {
            listen.port() == PORT && (listen.ip() == ip || (listen.ip().is_unspecified() && is_here(server)))
        });
        listens || self.own.iter().any(|net| net.contains(&ip))
    }
}

/// Whether `address` is of this host now, whatever its port. Nothing is sent.
pub(super) fn is_here(address: SocketAddr) -> bool {
    let ip = address.ip();
    let any = if ip.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    // To most of its own addresses the kernel sends from that address.
    let from = UdpSocket::bind((any, 0)).and_then(|socket| {
        socket.connect(address)?;
        socket.local_addr()
    });
    // To a further one of a network it sends from the first; and with ip_nonlocal_bind any can be bound.
    let is_listed = || {
        let listed = getifaddrs().into_iter().flatten().filter_map(|it| it.address);
        listed.filter_map(|it| Some(it.as_sockaddr_in()?.ip())).any(|own| ip.to_canonical() == own)
    };
    let can_be_bound = || UdpSocket::bind((ip, 0)).is_ok();
    is_loopback(ip) || from.is_ok_and(|from| from.ip() == ip) || can_be_bound() && is_listed()
}

/// Whether a socket reaches the loopback by `ip`: so it does by the unspecified address.
fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback() || ip.is_unspecified()
}

/// What comes of answering names at `listen`, if that is every address of this host, and what to write instead.
pub(super) fn open_resolver(listen: SocketAddr) -> Option<(String, String)> {
    listen.ip().to_canonical().is_unspecified().then(|| {
        let what = format!(
            "dns.listen: {listen} answers whoever reaches any address of this host, and where that is the internet strangers use it \
             for attacks on others (an open resolver)"
        );
        let port = listen.port();
        let lan: Vec<String> = lan_addresses().map(|ip| format!("`{ip}:{port}`")).collect();
        let lan = match lan.as_slice() {
            [] => "its address on the LAN".to_owned(),
            some => some.join(" or "),
        };
        (what, format!("name one address: {lan} for the LAN, `127.0.0.1:{port}` for this host alone"))
    })
}

/// The private IPv4 addresses of this host, other than those of tunnels.
fn lan_addresses() -> impl Iterator<Item = Ipv4Addr> {
    let interfaces = getifaddrs().into_iter().flatten();
    let lan =
        interfaces.filter(|it| !it.flags.intersects(InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_POINTOPOINT));
    let addresses = lan.filter_map(|it| Some(it.address?.as_sockaddr_in()?.ip()));
    addresses.filter(Ipv4Addr::is_private)
}

/// An address of resolv.conf; a link-local one has its link behind a `%`.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(SocketAddr::new(ip, PORT));
    }
    let (ip, link) = text.split_once('%')?;
    let scope = link.parse().ok().or_else(|| if_nametoindex(link).ok())?;
    Some(SocketAddrV6::new(ip.parse().ok()?, PORT, 0, scope).into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    #[test]
    fn every_address_is_an_open_resolver_and_one_address_is_none() {
        let told = |listen: &str| open_resolver(listen.parse().unwrap());
        for every in ["0.0.0.0:53", "[::]:53", "[::ffff:0.0.0.0]:53"] {
            let (what, advice) = told(every).unwrap();
            assert!(what.contains(every) && advice.contains("`127.0.0.1:53` for this host alone"), "{what}: {advice}");
        }
        assert!(told("0.0.0.0:5353").unwrap().1.contains("127.0.0.1:5353"));
        for one in ["127.0.0.1:53", "[::1]:53", "192.168.1.1:53", "[fd00::1]:53"] {
            assert_eq!(told(one), None, "{one}");
        }
    }

    use super::*;
    use crate::dns::System;

    struct Host {
        folder: tempfile::TempDir,
    }

    impl Host {
        fn new(resolv_conf: &str, behind: Option<&str>) -> Self {
            let host = Self { folder: tempfile::tempdir().unwrap() };
            host.write(resolv_conf);
            if let Some(text) = behind {
                fs::write(host.path("behind"), text).unwrap();
            }
            host
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn write(&self, text: &str) {
            fs::File::create(self.path("resolv.conf")).unwrap().write_all(text.as_bytes()).unwrap();
        }

        fn system(&self, captured: bool, listen: Option<&str>) -> FromSystem {
            FromSystem {
                own: vec!["198.18.0.0/16".parse().unwrap(), "fdfe:dcba:9876::1/126".parse().unwrap()],
                listen: listen.map(|text| text.parse().unwrap()),
                captured,
                resolv_conf: self.path("resolv.conf"),
                behind_stubs: vec![self.path("missing"), self.path("behind")],
                known: Mutex::new(None),
            }
        }
    }

    fn asked(resolv_conf: &str, behind: Option<&str>, captured: bool, listen: Option<&str>) -> Vec<String> {
        let found = Host::new(resolv_conf, behind).system(captured, listen).nameservers();
        found.unwrap_or_default().iter().map(|server| server.ip().to_string()).collect()
    }

    #[test]
    fn a_stub_is_asked_unless_its_questions_would_come_to_us() {
        let stub = "nameserver 127.0.0.1 # dnsmasq\n";
        assert_eq!(asked(stub, Some("nameserver 9.9.9.9"), false, None), ["127.0.0.1"]);
        assert_eq!(asked(stub, Some("nameserver 9.9.9.9"), true, None), ["9.9.9.9"]);
        assert_eq!(asked(stub, None, true, None), ["127.0.0.1"], "it may speak TLS to those behind it");
        let both = "nameserver 127.0.0.53\nnameserver 192.0.2.53   # comment\noptions edns0\n";
        assert_eq!(asked(both, None, true, None), ["192.0.2.53"]);
    }

    #[test]
    fn a_stub_that_would_ask_us_is_told_of_unless_others_are_asked() {
        let found = |text: &str, captured| {
            let host = Host::new(text, None);
            let system = host.system(captured, None);
            system.stub_among(&system.nameservers().unwrap())
        };
        let told = found("nameserver 127.0.0.1\n", true).unwrap();
        assert!(told.contains("(127.0.0.1)") && told.contains("asks those whom it asks"), "{told}");
        assert_eq!(found("nameserver 127.0.0.1\n", false), None);
        assert_eq!(found("nameserver 127.0.0.1\nnameserver 192.0.2.53\n", true), None);
        let other =
            profile("tun: {enable: true}\ndns: {enable: true, nameserver: [9.9.9.9]}\nrules: ['MATCH,DIRECT']\n");
        assert_eq!(stub_in_words(&other), None);
    }

    #[test]
    fn we_are_not_our_own_nameserver() {
        let text = "nameserver 127.0.0.1\nnameserver 198.18.0.2\nnameserver fdfe:dcba:9876::2\nnameserver 192.0.2.53\n";
        assert_eq!(asked(text, None, false, Some("0.0.0.0:53")), ["192.0.2.53"]);
        assert_eq!(asked(text, None, false, Some("127.0.0.1:53")), ["192.0.2.53"]);
        assert_eq!(asked(text, None, false, Some("127.0.0.1:1053")), ["127.0.0.1", "192.0.2.53"]);
        assert!(asked("search lan\n", Some("nameserver 9.9.9.9"), false, None).is_empty());
    }

    #[test]
    fn an_address_is_of_this_host_in_whatever_way_it_is_written() {
        let here = |ip: &str| is_here(SocketAddr::new(ip.parse().unwrap(), PORT));
        assert!(["127.0.0.53", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"].into_iter().all(here));
        let own = getifaddrs().unwrap().filter_map(|it| Some(it.address?.as_sockaddr_in()?.ip().to_string()));
        assert!(own.into_iter().all(|ip| here(&ip)));
        assert!(!["192.0.2.53", "2001:db8::53", "::ffff:192.0.2.53"].into_iter().any(here));
    }

    #[test]
    fn the_loopback_is_asked_beside_another_address_of_this_host_and_not_beside_others() {
        let text = "nameserver 127.0.0.53\nnameserver ::ffff:127.0.0.1\n";
        assert_eq!(asked(text, Some("nameserver 9.9.9.9"), true, None), ["9.9.9.9"]);
        for ip in lan_addresses() {
            let text = format!("nameserver 127.0.0.1\nnameserver {ip}\n");
            assert_eq!(asked(&text, Some("nameserver 9.9.9.9"), true, None), ["127.0.0.1", &ip.to_string()]);
            let text = format!("nameserver {ip}\nnameserver 192.0.2.53\n");
            assert_eq!(asked(&text, None, true, None), [&ip.to_string(), "192.0.2.53"], "it may know names of the LAN");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_files_are_read_again_and_what_was_there_outlives_our_own_address() {
        let host = Host::new("", None);
        let system = host.system(true, None);
        let found = || system.nameservers().map(|found| found[0].ip().to_string());
        assert!(found().unwrap_err().contains("names no nameserver"));
        host.write("nameserver 192.0.2.1\n");
        tokio::time::advance(FRESH).await;
        assert_eq!(found().unwrap(), "192.0.2.1", "the network came up later");
        host.write("nameserver 198.18.0.2\n");
        tokio::time::advance(FRESH).await;
        assert_eq!(found().unwrap(), "192.0.2.1", "the file is ours now");
        host.write("nameserver 192.0.2.9\n");
        tokio::time::advance(FRESH).await;
        assert_eq!(found().unwrap(), "192.0.2.9", "another network");
    }

    #[test]
    fn a_link_local_nameserver_keeps_its_link() {
        assert_eq!(address("fe80::1%7"), Some("[fe80::1%7]:53".parse().unwrap()));
        assert_eq!(address("fe80::1%no-such-link"), None);
        assert_eq!(address("dns.example"), None);
    }

    fn profile(text: &str) -> Profile {
        let (profile, report) = crate::profile::read("p.yaml", text.as_bytes());
        assert!(!report.has_errors(), "{report}");
        profile.unwrap()
    }

    #[tokio::test]
    async fn nobody_is_asked_whom_the_profile_does_not_name() {
        for (text, expected) in [
            ("{enable: false, nameserver: [192.0.2.1]}", "[system]"),
            (
                "{enable: true, nameserver: [192.0.2.1, 'tcp://dns.example:5353', system]}",
                "[192.0.2.1:53, dns.example:5353, system]",
            ),
            ("{enable: true, nameserver: [dns.example], default-nameserver: [system]}", "[dns.example:53]"),
        ] {
            let profile = profile(&format!("dns: {text}\nrules: ['MATCH,DIRECT']\n"));
            let found = find(&profile, &Addresses::of(&profile), &Dialer::default(), &Arc::default()).unwrap();
            assert_eq!(format!("{found:?}"), expected);
        }
    }
}
