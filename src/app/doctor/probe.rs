//! Asking the network: a question as programs ask it, the nameservers, and the proxies of the profile. All at once, and
//! none for long.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::build::Addresses;
use super::super::load::{self, Loaded};
use super::super::nameservers;
use super::checks::is_fake;
use super::gateways;
use super::gather::hijacks;
use super::record::{Heard, Probes, Record, ResolvConf, RunState, Server};
use crate::dns::{self, Dns};
use crate::net::{Address, DialError, Host, Lookup};
use crate::outbound::KINDS;
use crate::platform::{self, Dialer, DnsPlan, Family};
use crate::profile::{Nameserver, Profile};

/// What is asked for: the name exists for good (RFC 2606).
pub(super) const NAME: &str = "www.example.com";
/// How long one answer may take; a question is sent twice within it, the second time beside others.
const ANSWER: Duration = Duration::from_secs(4);
/// How long one connection may take, the look-up of its name included.
const CONNECTION: Duration = Duration::from_secs(6);
/// As late before that something is still worth to be begun.
const LAST_MOMENT: Duration = Duration::from_millis(50);
/// Addresses that are not those of any network of a host's own (a.root-servers.net). Nothing is sent there.
const FAR: [(Family, IpAddr); 2] = [
    (Family::V4, IpAddr::V4(Ipv4Addr::new(198, 41, 0, 4))),
    (Family::V6, IpAddr::V6(Ipv6Addr::new(0x2001, 0x503, 0xba3e, 0, 0, 0, 2, 0x30))),
];
/// "Discard" (RFC 863): any port would do.
const DISCARD: u16 = 9;
/// The port of names.
const DNS: u16 = 53;

/// Asks everybody.
pub(super) async fn all(record: &Record, loaded: Option<&Loaded>) -> Probes {
    let profile = loaded.and_then(|loaded| loaded.profile.as_ref());
    let plan = record.plan().filter(|plan| !plan.rules.is_empty());
    let plain = Dialer::default();
    let listed = system_nameservers(record);
    let question = async {
        let asked = listed.first().copied().filter(|_| plan.is_some_and(hijacks))?;
        let answer = match ask(&plain, asked, false).await {
            Ok(Heard::Answer(addresses)) => Ok(addresses),
            Ok(Heard::Refusal(code)) => Err(format!("it answers {code}")),
            Ok(Heard::OfItsOwn) => Err(silence(ANSWER)),
            Err(why) => Err(why),
        };
        Some((asked, answer))
    };
    // Past a run goes only what carries its mark, and that takes a capability.
    let captured = plan.is_some() && !record.rights.network;
    let past = Dialer { mark: plan.map(platform::HostPlan::own_mark), ..Dialer::default() };
    let answers =
        async { if captured { Vec::new() } else { nameservers_answer(&past, record, profile, &listed).await } };
    let connections = async {
        match (profile, loaded) {
            (Some(profile), Some(loaded)) if !captured => servers_answer(&past, profile, loaded.report.file()).await,
            _ => Vec::new(),
        }
    };
    let gateways = gateways::ask(&past, record);
    let (question, nameservers, servers, (gateways, direct)) = tokio::join!(question, answers, connections, gateways);
    let listed = match record.run {
        RunState::Absent => listed_answer(&plain, &listed, &nameservers).await,
        _ => Vec::new(),
    };
    let way = |(family, ip): (Family, IpAddr)| (family, past.source_for(SocketAddr::new(ip, DISCARD)).is_some());
    let routed = if captured { Vec::new() } else { FAR.into_iter().map(way).collect() };
    let fake = |ip: &IpAddr| plan.is_some_and(|plan| is_fake(plan, *ip));
    let looped = nameservers.iter().filter(|asked| asked.for_sure && asked.addresses().iter().any(fake));
    let looped = looped.map(|asked| asked.shown.clone()).collect();
    let nameservers = nameservers.into_iter().map(|asked| (asked.shown, asked.outcome)).collect();
    Probes { question, nameservers, looped, listed, routed, gateways, direct, servers, captured }
}

/// Those in resolv.conf.
fn system_nameservers(record: &Record) -> Vec<SocketAddr> {
    match &record.resolver.resolv_conf {
        ResolvConf::Text(text) => platform::nameservers(text).into_iter().filter_map(nameservers::address).collect(),
        _ => Vec::new(),
    }
}

/// Whether the nameservers of resolv.conf that are not among those `asked` answer.
async fn listed_answer(
    dialer: &Dialer,
    listed: &[SocketAddr],
    asked: &[Asked],
) -> Vec<(String, Result<Heard, String>)> {
    let new = listed.iter().filter(|server| asked.iter().all(|it| it.shown != shown_as(**server)));
    join_all(new.map(|server| async { (shown_as(*server), ask(dialer, *server, false).await) })).await
}

/// A nameserver that was asked past a run.
struct Asked {
    shown: String,
    /// The run asks it too, as far as that is known.
    for_sure: bool,
    outcome: Result<Heard, String>,
}

impl Asked {
    fn addresses(&self) -> &[IpAddr] {
        match &self.outcome {
            Ok(Heard::Answer(addresses)) => addresses,
            _ => &[],
        }
    }
}

fn shown_as(server: SocketAddr) -> String {
    if server.port() == DNS { server.ip().to_string() } else { server.to_string() }
}

async fn nameservers_answer(
    dialer: &Dialer,
    record: &Record,
    profile: Option<&Profile>,
    listed: &[SocketAddr],
) -> Vec<Asked> {
    // What tunproxy wrote into resolv.conf is itself.
    let ours = record.plan().is_some_and(|plan| matches!(plan.dns, DnsPlan::Rewrite { .. }));
    let known = profile.is_some() || record.looped() > 0;
    // One on this host may hand out fake addresses: the run asks those behind it.
    let sure = |server: &SocketAddr| !nameservers::is_here(*server);
    let system = || {
        if ours { Vec::new() } else { listed.iter().map(|server| (*server, false, known && sure(server))).collect() }
    };
    let servers: Vec<(SocketAddr, bool, bool)> = match profile.filter(|profile| profile.dns.enable) {
        None => system(),
        Some(profile) => profile
            .dns
            .nameserver
            .iter()
            .flat_map(|server| match server {
                Nameserver::System => system(),
                Nameserver::Udp(address) => address.socket().map(|it| (it, false, sure(&it))).into_iter().collect(),
                Nameserver::Tcp(address) => address.socket().map(|it| (it, true, sure(&it))).into_iter().collect(),
            })
            .collect(),
    };
    join_all(servers.into_iter().map(|(server, tcp, for_sure)| async move {
        Asked { shown: shown_as(server), for_sure, outcome: ask(dialer, server, tcp).await }
    }))
    .await
}

/// Asks `server` for the addresses of [`NAME`]; when that comes to nothing, for what it can say without the internet.
async fn ask(dialer: &Dialer, server: SocketAddr, tcp: bool) -> Result<Heard, String> {
    let answer = timeout(ANSWER, async {
        if tcp {
            let connected = dialer.try_tcp(server, ANSWER - LAST_MOMENT).await;
            return connected.map(|()| Heard::Answer(Vec::new())).map_err(|error| in_words(&error, ANSWER));
        }
        let socket = dialer.udp(server.ip()).map_err(|error| error.to_string())?;
        socket.connect(server).await.map_err(|error| error.to_string())?;
        exchange(&socket).await
    });
    answer.await.unwrap_or_else(|_| Err(silence(ANSWER)))
}

fn silence(time: Duration) -> String {
    format!("no answer in {} s", time.as_secs())
}

/// Why a connection that had so much time did not come about.
fn in_words(error: &DialError, time: Duration) -> String {
    match error {
        DialError::TimedOut => silence(time),
        other => other.to_string(),
    }
}

/// One question of each: a name of the internet, and two that a nameserver answers of its own (RFC 6761 section 6.3; the
/// version, which even those that keep it to themselves refuse in words).
fn questions() -> Result<[Message; 3], String> {
    let question = |name: &str, class: DNSClass, kind: RecordType| {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        let mut query = Query::query(Name::from_ascii(name).map_err(|error| error.to_string())?, kind);
        query.set_query_class(class);
        message.add_query(query);
        Ok::<_, String>(message)
    };
    Ok([
        question(&format!("{NAME}."), DNSClass::IN, RecordType::A)?,
        question("localhost.", DNSClass::IN, RecordType::A)?,
        question("version.bind.", DNSClass::CH, RecordType::TXT)?,
    ])
}

/// Sends the first question, and all of them where it is not answered in half of the time that there is.
async fn exchange(socket: &platform::UdpSocket) -> Result<Heard, String> {
    let questions = questions()?;
    let bytes: Result<Vec<Vec<u8>>, _> = questions.iter().map(Message::to_vec).collect();
    let bytes = bytes.map_err(|error| error.to_string())?;
    let (mut buffer, mut of_its_own) = ([0; 4096], false);
    for sent in [&bytes[..1], &bytes[..]] {
        for question in sent {
            socket.send(question).await.map_err(|error| error.to_string())?;
        }
        // A little less than there is, so that what was heard is told.
        let until = Instant::now() + ANSWER * 9 / 20;
        while let Ok(received) = timeout_at(until, socket.recv(&mut buffer)).await {
            let length = received.map_err(|error| error.to_string())?;
            let Ok(answer) = Message::from_vec(&buffer[..length]) else { continue };
            match questions.iter().position(|question| question.metadata.id == answer.metadata.id) {
                Some(0) => return Ok(heard(&answer)),
                Some(_) => of_its_own = true,
                None => {}
            }
        }
    }
    if of_its_own { Ok(Heard::OfItsOwn) } else { Err(silence(ANSWER)) }
}

fn heard(answer: &Message) -> Heard {
    match answer.metadata.response_code {
        ResponseCode::ServFail => Heard::Refusal("SERVFAIL"),
        ResponseCode::Refused => Heard::Refusal("REFUSED"),
        _ => Heard::Answer(
            answer
                .answers
                .iter()
                .filter_map(|record| match &record.data {
                    RData::A(ip) => Some(IpAddr::V4(ip.0)),
                    _ => None,
                })
                .collect(),
        ),
    }
}

/// Connects to each proxy of the kinds that are built.
async fn servers_answer(dialer: &Dialer, profile: &Profile, file: &str) -> Vec<Server> {
    let built = |kind: &str| KINDS.iter().any(|it| it.name == kind);
    let used = load::used(profile);
    let servers: Vec<(Server, Address)> = profile
        .proxies
        .iter()
        .filter(|proxy| built(&proxy.kind))
        .filter_map(|proxy| {
            let text = |key: &str| proxy.node.child(key).and_then(|node| node.text());
            let address = Address { host: Host::parse(text("server")?).ok()?, port: text("port")?.parse().ok()? };
            let server = Server {
                shown: format!("{} ({address})", proxy.name),
                place: format!("{file}:{}", proxy.node.child("server")?.place.at.line),
                used: used.contains(&proxy.name),
                example: is_example(&address.host),
                outcome: Ok(()),
            };
            Some((server, address))
        })
        .collect();
    if servers.is_empty() {
        return Vec::new();
    }
    let lookup = lookup(dialer, profile);
    join_all(servers.into_iter().map(|(server, address)| {
        let lookup = &lookup;
        async move {
            let connected = timeout(CONNECTION, connect(dialer, lookup.as_deref(), &address)).await;
            let outcome = connected.unwrap_or_else(|_| Err(silence(CONNECTION)));
            Server { outcome, ..server }
        }
    }))
    .await
}

/// Whether nobody can have this address: those of RFC 5737 and RFC 3849, the names of RFC 2606.
fn is_example(host: &Host) -> bool {
    match host {
        Host::Ip(IpAddr::V4(ip)) => ip.is_documentation(),
        Host::Ip(IpAddr::V6(ip)) => ip.segments()[..2] == [0x2001, 0xdb8],
        Host::Name(name) => {
            let under = |domain: &str| {
                name.as_str().strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            };
            ["example", "invalid", "test", "example.com", "example.net", "example.org"].into_iter().any(under)
        }
    }
}

/// The way in which a run would look names up.
fn lookup(dialer: &Dialer, profile: &Profile) -> Result<Arc<dyn Lookup>, String> {
    let tracers = Arc::default();
    let nameservers =
        nameservers::find(profile, &Addresses::of(profile), dialer, &tracers).map_err(|error| format!("{error:#}"))?;
    let dns = Dns::open(dns::Config {
        ipv6: profile.ipv6,
        mode: dns::Mode::Mapping,
        nameservers,
        tracers,
        dialer: dialer.clone(),
        log: None,
        runtime: Handle::current(),
    });
    dns.map(|dns| Arc::new(dns) as Arc<dyn Lookup>).map_err(|error| error.to_string())
}

async fn connect(
    dialer: &Dialer,
    lookup: Result<&(dyn Lookup + 'static), &String>,
    address: &Address,
) -> Result<(), String> {
    let until = Instant::now() + CONNECTION - LAST_MOMENT;
    let found: Arc<[IpAddr]> = match &address.host {
        Host::Ip(ip) => Arc::new([*ip]),
        Host::Name(name) => {
            let looked_up = lookup.map_err(String::clone)?.lookup(name).await;
            looked_up.map_err(|error| format!("its name cannot be looked up: {error}"))?
        }
    };
    let mut why = String::new();
    for ip in found.iter() {
        let left = until.saturating_duration_since(Instant::now());
        match dialer.try_tcp(SocketAddr::new(*ip, address.port), left).await {
            Ok(()) => return Ok(()),
            Err(error) => why = in_words(&error, CONNECTION),
        }
    }
    Err(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_stands_for_others_is_known_as_an_example() {
        let is = |host: &str| is_example(&Host::parse(host).unwrap());
        for host in ["192.0.2.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "proxy.example", "a.example.com"] {
            assert!(is(host), "{host}");
        }
        for host in ["192.168.1.1", "198.18.0.1", "2001:db9::1", "myexample.com", "example.de", "localhost"] {
            assert!(!is(host), "{host}");
        }
    }
}
