//! The host's own network as outbounds use it: marked sockets, and the real addresses of names.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::net::{Address, DialError, Host, Lookup, LookupError, Name, Reach};
use crate::platform::{DatagramSocket, Dialer, EchoSocket, Sending};

/// RFC 8305 section 8: the recommended Connection Attempt Delay.
const STAGGER: Duration = Duration::from_millis(250);

/// How long addresses of the family that `ip-version` prefers are waited for where those of the other are there.
const PREFERRED: Duration = Duration::from_secs(1);

/// How many addresses of a name are tried.
const ATTEMPTS: usize = 8;

/// How long reaching one of a name's addresses may take, all attempts together.
const DIAL: Duration = Duration::from_secs(30);

/// `ip-version`: which families of a name's addresses are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IpVersion {
    /// Both, in the order of the look-up.
    #[default]
    Dual,
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// IPv4 first.
    Ipv4Prefer,
    /// IPv6 first.
    Ipv6Prefer,
}

/// Opens sockets towards names and addresses.
#[derive(Clone)]
pub struct Egress {
    dialer: Dialer,
    lookup: Arc<dyn Lookup>,
    version: IpVersion,
}

impl Egress {
    /// Dials with `dialer` and asks `lookup` for the addresses of names.
    pub fn new(dialer: Dialer, lookup: Arc<dyn Lookup>) -> Self {
        Self { dialer: Dialer { for_flows: true, ..dialer }, lookup, version: IpVersion::default() }
    }

    /// The same, limited to or preferring a family.
    #[must_use]
    pub fn with_version(self, version: IpVersion) -> Self {
        Self { version, ..self }
    }

    /// The same, bound to a device (`interface-name`).
    #[must_use]
    pub fn with_interface(mut self, interface: String) -> Self {
        self.dialer.interface = Some(interface);
        self
    }

    /// Notes that `socket` sends to `to`, so that its datagrams are known should they come back by the TUN.
    pub fn notes(&self, socket: &DatagramSocket, to: SocketAddr) -> Option<Sending> {
        let (own, port) = self.dialer.own.as_ref().zip(socket.port())?;
        Some(own.sends(port, to))
    }

    /// Connects to `to`. The addresses of a name are tried in turn, the next one as soon as the last has failed or
    /// 250 ms have passed (RFC 8305 section 5); the first that answers wins.
    ///
    /// # Errors
    /// The most telling of the failures: that a host refused says more than that a network has no route.
    pub async fn tcp(&self, to: &Address) -> Result<TcpStream, DialError> {
        match &to.host {
            Host::Ip(ip) => self.dialer.tcp(SocketAddr::new(*ip, to.port)).await,
            Host::Name(name) => {
                let race = async {
                    let addresses = interleave(&self.addresses(name).await?);
                    self.race(addresses.into_iter().take(ATTEMPTS), to.port).await
                };
                timeout(DIAL, race).await.unwrap_or(Err(DialError::TimedOut))
            }
        }
    }

    async fn race(&self, addresses: impl Iterator<Item = IpAddr>, port: u16) -> Result<TcpStream, DialError> {
        let mut waiting = addresses.peekable();
        let mut attempts = FuturesUnordered::new();
        let mut failure: Option<DialError> = None;
        loop {
            if let Some(ip) = waiting.next() {
                attempts.push(self.dialer.tcp(SocketAddr::new(ip, port)));
            } else if attempts.is_empty() {
                return Err(failure.unwrap_or(DialError::Unreachable(Reach::Network)));
            }
            tokio::select! {
                biased;
                Some(outcome) = attempts.next() => match outcome {
                    Ok(stream) => return Ok(stream),
                    Err(error) => failure = Some(more_telling(failure, error)),
                },
                () = sleep(STAGGER), if waiting.peek().is_some() => {}
            }
        }
    }

    /// The real addresses of `name` that may be used, preferred first, never empty.
    ///
    /// # Errors
    /// The look-up's, in words. A client is to see an unreachable host, even where a nameserver was silent: it has
    /// waited for the look-up already, and silence would let it wait for a connection as well.
    pub async fn addresses(&self, name: &Name) -> Result<Vec<IpAddr>, DialError> {
        let nowhere = |words: String| DialError::Io(io::Error::new(io::ErrorKind::HostUnreachable, words));
        match self.look_up(name).await {
            Ok(found) => Ok(self.version.arrange(&found)),
            Err(LookupError::NoAddress) if matches!(self.version, IpVersion::Ipv4 | IpVersion::Ipv6) => {
                Err(nowhere(format!("{name} has no address of the family that ip-version allows")))
            }
            Err(error) => Err(nowhere(format!("{name}: {error}"))),
        }
    }

    /// A look-up of both families does not wait for long for the second, which may be the one that is wanted.
    async fn look_up(&self, name: &Name) -> Result<Arc<[IpAddr]>, LookupError> {
        let ipv4 = match self.version {
            IpVersion::Dual => return self.lookup.lookup(name).await,
            IpVersion::Ipv4 => return self.lookup.lookup_family(name, true).await,
            IpVersion::Ipv6 => return self.lookup.lookup_family(name, false).await,
            IpVersion::Ipv4Prefer => true,
            IpVersion::Ipv6Prefer => false,
        };
        let found = self.lookup.lookup(name).await?;
        if found.iter().any(|ip| ip.is_ipv4() == ipv4) {
            return Ok(found);
        }
        // Where it is known that there are none the answer is there.
        match timeout(PREFERRED, self.lookup.lookup_family(name, ipv4)).await {
            Ok(Ok(preferred)) => Ok(preferred.iter().chain(found.iter()).copied().collect()),
            Ok(Err(_)) | Err(_) => Ok(found),
        }
    }

    /// The address of `name` for datagrams, which cannot try one and see: the first to which there is a route. Where
    /// `ip-version` has no preference, the family of the client comes first.
    ///
    /// # Errors
    /// Those of [`addresses`](Self::addresses).
    pub async fn reachable(&self, name: &Name, from_ipv4: bool) -> Result<IpAddr, DialError> {
        let mut addresses = self.addresses(name).await?;
        if self.version == IpVersion::Dual {
            addresses.sort_by_key(|ip| ip.is_ipv4() != from_ipv4);
        }
        let routed = addresses.iter().find(|ip| addresses.len() == 1 || self.dialer.has_route(**ip));
        // Without a route the first says what a client of it would hear.
        Ok(*routed.unwrap_or(&addresses[0]))
    }

    /// An unconnected socket of the family of `to`.
    ///
    /// # Errors
    /// Those of the dialer.
    pub fn datagrams(&self, to: IpAddr) -> Result<DatagramSocket, DialError> {
        Ok(DatagramSocket::new(self.dialer.udp(to)?.into_std()?)?)
    }

    /// Whether sockets are bound to a device, by the number that it has when they are made.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.dialer.interface.is_some()
    }

    /// The address that we would send from to `to` now; None: there is no way.
    #[must_use]
    pub fn source_for(&self, to: SocketAddr) -> Option<IpAddr> {
        self.dialer.source_for(to)
    }

    /// A socket for echo requests of one family.
    ///
    /// # Errors
    /// Those of the dialer.
    pub fn echo(&self, ipv6: bool) -> Result<EchoSocket, DialError> {
        self.dialer.echo(ipv6)
    }

    /// The largest packet that goes out towards `ip` in one piece, as far as this host knows.
    #[must_use]
    pub fn path_mtu(&self, ip: IpAddr) -> Option<u32> {
        self.dialer.path_mtu(ip)
    }

    /// Whether `ip` is an address that only we hand out.
    #[must_use]
    pub fn is_fake(&self, ip: IpAddr) -> bool {
        self.dialer.is_fake(ip)
    }
}

impl IpVersion {
    fn arrange(self, addresses: &[IpAddr]) -> Vec<IpAddr> {
        let mut arranged = addresses.to_vec();
        match self {
            Self::Dual => {}
            Self::Ipv4 => arranged.retain(IpAddr::is_ipv4),
            Self::Ipv6 => arranged.retain(IpAddr::is_ipv6),
            Self::Ipv4Prefer => arranged.sort_by_key(IpAddr::is_ipv6),
            Self::Ipv6Prefer => arranged.sort_by_key(IpAddr::is_ipv4),
        }
        arranged
    }
}

/// RFC 8305 section 4: the families take turns, beginning with the preferred one.
fn interleave(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let first_is_v4 = addresses.first().is_some_and(IpAddr::is_ipv4);
    let (preferred, other): (Vec<IpAddr>, Vec<IpAddr>) =
        addresses.iter().partition(|address| address.is_ipv4() == first_is_v4);
    let longest = preferred.len().max(other.len());
    (0..longest).flat_map(|at| [preferred.get(at), other.get(at)]).flatten().copied().collect()
}

/// Which of two failures says more about the destination.
fn more_telling(earlier: Option<DialError>, later: DialError) -> DialError {
    fn weight(error: &DialError) -> u8 {
        match error {
            DialError::Refused => 5,
            DialError::Unreachable(Reach::Prohibited) => 4,
            DialError::TimedOut => 3,
            DialError::Unreachable(Reach::Network) => 0,
            DialError::Unreachable(_) => 1,
            _ => 2,
        }
    }
    match earlier {
        Some(earlier) if weight(&earlier) >= weight(&later) => earlier,
        _ => later,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::BoxFuture;
    use crate::outbound::fixture::{Names, black_hole, closed_port};

    fn address(host: &str, port: u16) -> Address {
        Address { host: Host::parse(host).unwrap(), port }
    }

    fn egress(names: &[(&str, &[&str])]) -> Egress {
        Egress::new(Dialer::default(), Names::shared(names))
    }

    #[tokio::test]
    async fn the_next_address_is_tried_when_one_refuses() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let egress = egress(&[("two.test", &["127.0.0.9", "::1", "127.0.0.1"])]);
        let stream = egress.tcp(&address("two.test", port)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_does_not_hold_up_the_next() {
        let hole = black_hole();
        let port = hole.address.port();
        let listener = std::net::TcpListener::bind(("127.0.0.77", port)).unwrap();
        let egress = egress(&[("two.test", &["127.0.0.1", "127.0.0.77"])]);
        let started = tokio::time::Instant::now();
        let stream = egress.tcp(&address("two.test", port)).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
        assert!(started.elapsed() >= STAGGER);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_answering_is_a_timeout() {
        let hole = black_hole();
        let egress = egress(&[("hole.test", &["127.0.0.1"])]);
        let by_name = egress.tcp(&address("hole.test", hole.address.port())).await;
        assert!(matches!(by_name, Err(DialError::TimedOut)), "{by_name:?}");
        let by_address = egress.tcp(&hole.address.into()).await;
        assert!(matches!(by_address, Err(DialError::TimedOut)), "{by_address:?}");
    }

    #[tokio::test]
    async fn a_refusal_says_more_than_a_missing_route() {
        let closed = closed_port();
        let egress = egress(&[("both.test", &["127.0.0.1", "255.255.255.255"])]);
        let refused = egress.tcp(&address("both.test", closed.address.port())).await;
        assert!(matches!(refused, Err(DialError::Refused)), "{refused:?}");
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_said_in_words() {
        let error = egress(&[]).tcp(&address("nowhere.test", 80)).await.unwrap_err();
        assert_eq!(error.to_string(), "nowhere.test: no such name");
        let egress = egress(&[("v4.test", &["127.0.0.1"])]).with_version(IpVersion::Ipv6);
        let error = egress.tcp(&address("v4.test", 80)).await.unwrap_err();
        assert!(error.to_string().contains("ip-version"), "{error}");
    }

    struct Silent;

    impl Lookup for Silent {
        fn lookup<'a>(&'a self, _: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
            Box::pin(async { Err(LookupError::TimedOut) })
        }
    }

    #[tokio::test]
    async fn silent_nameservers_are_an_unreachable_host_and_no_silence() {
        let egress = Egress::new(Dialer::default(), Arc::new(Silent));
        let error = egress.tcp(&address("www.test", 80)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::HostUnreachable);
        assert_eq!(error.to_string(), "www.test: no nameserver answered in time");
    }

    #[tokio::test]
    async fn datagrams_go_to_the_family_that_ip_version_wants_and_else_to_the_clients() {
        let names: &[(&str, &[&str])] = &[("both.test", &["127.0.0.1", "::1"]), ("v4.test", &["127.0.0.1"])];
        let name = |text: &str| Name::new(text).unwrap();
        for (version, from_ipv4, expected) in [
            (IpVersion::Dual, true, "127.0.0.1"),
            (IpVersion::Dual, false, "::1"),
            (IpVersion::Ipv4, false, "127.0.0.1"),
            (IpVersion::Ipv6, true, "::1"),
            (IpVersion::Ipv4Prefer, false, "127.0.0.1"),
            (IpVersion::Ipv6Prefer, true, "::1"),
        ] {
            let egress = egress(names).with_version(version);
            let found = egress.reachable(&name("both.test"), from_ipv4).await.unwrap();
            assert_eq!(found.to_string(), expected, "{version:?}");
        }
        let egress = egress(names).with_version(IpVersion::Ipv6);
        assert!(egress.reachable(&name("v4.test"), true).await.is_err());
    }

    /// Whose IPv6 addresses come later than a look-up of both families waits.
    struct Late(Duration);

    impl Lookup for Late {
        fn lookup<'a>(&'a self, _: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
            Box::pin(async { Ok([IpAddr::from([127, 0, 0, 1])].into()) })
        }

        fn lookup_family<'a>(&'a self, _: &'a Name, ipv4: bool) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>> {
            Box::pin(async move {
                let v6 = IpAddr::from(std::net::Ipv6Addr::LOCALHOST);
                sleep(if ipv4 { Duration::ZERO } else { self.0 }).await;
                Ok([if ipv4 { IpAddr::from([127, 0, 0, 1]) } else { v6 }].into())
            })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_family_that_is_wanted_is_waited_for_and_one_that_is_preferred_for_a_second() {
        let found = async |version, late| {
            let egress = Egress::new(Dialer::default(), Arc::new(Late(Duration::from_millis(late))));
            let found = egress.with_version(version).addresses(&Name::new("late.test").unwrap()).await.unwrap();
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(found(IpVersion::Ipv6, 3000).await, ["::1"]);
        assert_eq!(found(IpVersion::Ipv6Prefer, 800).await, ["::1", "127.0.0.1"]);
        assert_eq!(found(IpVersion::Ipv6Prefer, 3000).await, ["127.0.0.1"]);
        assert_eq!(found(IpVersion::Ipv4Prefer, 3000).await, ["127.0.0.1"]);
        assert_eq!(found(IpVersion::Dual, 3000).await, ["127.0.0.1"]);
    }

    #[tokio::test]
    async fn a_fake_address_is_never_dialled() {
        let dialer = Dialer { fake: vec!["127.0.0.0/8".parse().unwrap()], ..Dialer::default() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let egress = Egress::new(dialer, Names::shared(&[]));
        let dialled = egress.tcp(&listener.local_addr().unwrap().into()).await;
        assert!(matches!(dialled, Err(DialError::Unreachable(Reach::Host))), "{dialled:?}");
    }

    #[test]
    fn families_take_turns() {
        let addresses: Vec<IpAddr> = ["::1", "::2", "::3", "10.0.0.1"].iter().map(|ip| ip.parse().unwrap()).collect();
        let turns: Vec<String> = interleave(&addresses).iter().map(ToString::to_string).collect();
        assert_eq!(turns, ["::1", "10.0.0.1", "::2", "::3"]);
    }
}
