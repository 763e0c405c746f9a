//! The words every other module shares: names, addresses, the two transports and how a dial fails.

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A boxed future that may cross threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A domain name as the DNS has it: lower-case ASCII, no trailing dot, 1 to 253 bytes, labels of 1 to 63.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

/// Why a text is not a domain name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Nothing was left after the trailing dot was removed.
    #[error("the name is empty")]
    Empty,
    /// RFC 1035 section 2.3.4: names have at most 253 characters, labels at most 63.
    #[error("the name or one of its labels is too long")]
    TooLong,
    /// Two dots follow each other, or the name begins with one.
    #[error("the name has an empty label")]
    EmptyLabel,
    /// White space, a control character, or one that no host name carries.
    #[error("the name has a character that no domain name carries")]
    BadCharacter,
    /// It is not ASCII, and has no form in it (RFC 5891).
    #[error("the name has no form in ASCII")]
    NotAscii,
}

impl Name {
    /// Puts `text` into lower-case ASCII (RFC 5891: labels of other scripts become `xn--…`), drops one trailing dot and
    /// checks the lengths of RFC 1035.
    ///
    /// # Errors
    /// [`InvalidName`] says which limit was broken.
    pub fn new(text: &str) -> Result<Self, InvalidName> {
        // First the form that counts, then its limits: a name may grow on the way.
        let ascii = if text.is_ascii() {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(idna::domain_to_ascii(text).map_err(|_| InvalidName::NotAscii)?)
        };
        let text = ascii.strip_suffix('.').unwrap_or(&ascii);
        if text.is_empty() {
            return Err(InvalidName::Empty);
        }
        if text.len() > 253 || text.split('.').any(|label| label.len() > 63) {
            return Err(InvalidName::TooLong);
        }
        if text.split('.').any(str::is_empty) {
            return Err(InvalidName::EmptyLabel);
        }
        if text.bytes().any(|byte| byte <= b' ' || byte == 0x7f || b"/:@[]\\\"".contains(&byte)) {
            return Err(InvalidName::BadCharacter);
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Maps keyed by names can be asked with text, without a name being made for it.
impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a flow wants to go: a name, or an address.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Host {
    /// A domain name.
    Name(Name),
    /// An IP address.
    Ip(IpAddr),
}

impl Host {
    /// Reads an IP address (brackets allowed around IPv6) or else a name.
    ///
    /// # Errors
    /// The text is neither.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        match bare.parse() {
            Ok(ip) => Ok(Self::Ip(ip)),
            Err(_) => {
                let name = Name::new(text)?;
                // `192.0.2.1.` and digits of other scripts are an address too.
                Ok(name.as_str().parse().map_or(Self::Name(name), Self::Ip))
            }
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => name.fmt(f),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

/// A host and a port.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Address {
    /// The host.
    pub host: Host,
    /// The port, in host byte order.
    pub port: u16,
}

impl Address {
    /// The socket address, when the host is an IP address.
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        match self.host {
            Host::Ip(ip) => Some(SocketAddr::new(ip, self.port)),
            Host::Name(_) => None,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(from: SocketAddr) -> Self {
        Self { host: Host::Ip(from.ip()), port: from.port() }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]:{}", self.port),
            host => write!(f, "{host}:{}", self.port),
        }
    }
}

/// A byte stream towards an upstream or a client.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {
    /// Makes the coming drop an abort: the peer sees a reset (`SO_LINGER` 0), not an orderly end.
    fn reset(&mut self) {}

    /// Ready when the peer has reset the stream or is lost, for one who neither reads nor writes; None where that shows
    /// in no other way.
    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        None
    }

    /// Bytes that were written and that the peer has not acknowledged, as far as that is known. An abort loses them.
    fn unacknowledged(&self) -> usize {
        0
    }
}

/// A [`Stream`] of any kind.
pub type BoxStream = Box<dyn Stream>;

impl Stream for BoxStream {
    fn reset(&mut self) {
        (**self).reset();
    }

    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        (**self).broken()
    }

    fn unacknowledged(&self) -> usize {
        (**self).unacknowledged()
    }
}

impl Stream for tokio::net::TcpStream {
    fn reset(&mut self) {
        // A failure leaves an orderly close, which is the next best thing.
        let _ = socket2::SockRef::from(&*self).set_linger(Some(Duration::ZERO));
    }

    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        // The socket's own readiness has no place for one who waits for errors alone.
        let twin = self.as_fd().try_clone_to_owned().ok()?;
        // SAFETY: the twin is its own one descriptor, which nobody exchanges.
        let twin = unsafe { AsyncFd::register_with_interest(twin, Interest::ERROR) }.ok()?;
        Some(Box::pin(async move { drop(twin.ready(Interest::ERROR).await) }))
    }

    fn unacknowledged(&self) -> usize {
        let mut bytes = 0;
        // SAFETY: the request writes one int, to which the pointer leads (tcp(7), SIOCOUTQ).
        match unsafe { unacknowledged(self.as_raw_fd(), &raw mut bytes) } {
            Ok(_) => usize::try_from(bytes).unwrap_or(0),
            Err(_) => 0,
        }
    }
}

/// An idle peer is asked for a sign of life after this time, and again each time that it gives none (mihomo, as all
/// programs in Go: 15 s).
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Questions without an answer after which the connection is given up.
const KEEP_ALIVE_RETRIES: u32 = 9;

/// Has the kernel find out by itself whether the peer of an idle TCP connection is still there. That costs packets, and
/// no wake-up of ours.
pub fn keep_alive(socket: &impl AsFd) {
    let keep_alive =
        socket2::TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE).with_retries(KEEP_ALIVE_RETRIES);
    // Without it a vanished peer is noticed later.
    let _ = socket2::SockRef::from(socket).set_tcp_keepalive(&keep_alive);
}

nix::ioctl_read_bad!(
    /// SIOCOUTQ.
    unacknowledged,
    libc::TIOCOUTQ,
    libc::c_int
);

/// What came back on a [`Datagram`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Received {
    /// A payload, now in the caller's buffer, from this peer.
    Payload(Address),
    /// Several payloads of one peer, now one behind the other in the caller's buffer.
    Train {
        /// The peer.
        from: Address,
        /// The bytes of each; the last may be shorter.
        size: NonZeroU16,
    },
    /// The network answered an earlier datagram to `to` with an ICMP error.
    Failed {
        /// Where the failed datagram was sent.
        to: Address,
        /// What the network said.
        why: Reach,
    },
}

/// A socket-like thing that carries datagrams to and from many peers (endpoint-independent, RFC 4787).
pub trait Datagram: Send {
    /// Sends one datagram. `dont_fragment` asks for DF on the wire; what does not fit is `EMSGSIZE`.
    ///
    /// # Errors
    /// Those of the socket; the association lives on unless the kind is `BrokenPipe`.
    fn poll_send_to(
        &mut self,
        cx: &mut Context<'_>,
        payload: &[u8],
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<()>>;

    /// Sends the first datagrams of `train`, which holds several of `size` bytes each one behind the other (the last may
    /// be shorter), as many as go out at once. Returns the bytes that are done with, those of one datagram at least.
    ///
    /// # Errors
    /// Those of [`poll_send_to`](Self::poll_send_to) for the first datagram alone: what follows it is still to be sent.
    fn poll_send_train(
        &mut self,
        cx: &mut Context<'_>,
        train: &[u8],
        size: NonZeroU16,
        to: &Address,
        dont_fragment: bool,
    ) -> Poll<io::Result<usize>> {
        let first = &train[..train.len().min(usize::from(size.get()))];
        self.poll_send_to(cx, first, to, dont_fragment).map_ok(|()| first.len())
    }

    /// Receives one datagram or one train of them into `buffer`, or the error that an earlier one met.
    ///
    /// # Errors
    /// The transport itself is gone, for instance the proxy closed the control connection.
    fn poll_recv_from(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>>;
}

/// A [`Datagram`] of any kind.
pub type BoxDatagram = Box<dyn Datagram>;

/// How far a packet got before the network gave up: the codes of RFC 792 and RFC 4443 that clients tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// No route to the network (ICMP 3/0, ICMPv6 1/0).
    Network,
    /// No answer from the host (3/1, 1/3).
    Host,
    /// Nobody listens on the port (3/3, 1/4).
    Port,
    /// A firewall on the way refuses (3/13, 1/1).
    Prohibited,
    /// The packet is larger than a link on the way; the MTU in bytes, 0 if unknown (3/4, 2/0).
    TooBig(u32),
}

/// Why a rule's own outbound turned a flow away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// Say so at once: TCP reset, UDP port unreachable.
    Answer,
    /// Say nothing.
    Drop,
}

/// Why an outbound could not be reached. Each becomes what a client of the real thing would see.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The destination, or a proxy on its behalf, refused the connection.
    #[error("connection refused")]
    Refused,
    /// The network is in the way.
    #[error("unreachable ({0:?})")]
    Unreachable(Reach),
    /// Nobody answered in time.
    #[error("timed out")]
    TimedOut,
    /// The profile's own REJECT or REJECT-DROP.
    #[error("rejected by the profile")]
    Rejected(Reject),
    /// The outbound does not carry this kind of flow.
    #[error("{0}")]
    Unsupported(String),
    /// The upstream proxy, or a rule of ours, does not allow it; the text says who and why.
    #[error("{0}")]
    Denied(String),
    /// This host has no descriptor left for the flow. It says nothing about the destination.
    #[error("no file descriptors are left here")]
    Exhausted,
    /// Anything else that the operating system or the upstream reports.
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl DialError {
    /// What happened, whoever reports it and in whatever words: [`DialError::Io`] may carry a time-out or a missing route
    /// of an upstream proxy or of a look-up, which a client must see as such.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Refused | Self::Denied(_) | Self::Unreachable(Reach::Port) => io::ErrorKind::ConnectionRefused,
            Self::Unreachable(Reach::Network) => io::ErrorKind::NetworkUnreachable,
            Self::Unreachable(Reach::Host | Reach::TooBig(_)) => io::ErrorKind::HostUnreachable,
            Self::Unreachable(Reach::Prohibited) | Self::Rejected(_) => io::ErrorKind::PermissionDenied,
            Self::TimedOut => io::ErrorKind::TimedOut,
            Self::Unsupported(_) => io::ErrorKind::Unsupported,
            Self::Exhausted => io::ErrorKind::ResourceBusy,
            Self::Io(error) => error.kind(),
        }
    }

    /// The same once more, for another flow that waited for the same dial.
    #[must_use]
    pub fn again(&self) -> Self {
        match self {
            Self::Refused => Self::Refused,
            Self::Unreachable(why) => Self::Unreachable(*why),
            Self::TimedOut => Self::TimedOut,
            Self::Rejected(manner) => Self::Rejected(*manner),
            Self::Unsupported(words) => Self::Unsupported(words.clone()),
            Self::Denied(words) => Self::Denied(words.clone()),
            Self::Exhausted => Self::Exhausted,
            Self::Io(error) => Self::Io(io::Error::new(error.kind(), error.to_string())),
        }
    }
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Self::Refused,
            Some(libc::ENETUNREACH | libc::ENETDOWN) => Self::Unreachable(Reach::Network),
            Some(libc::EHOSTUNREACH | libc::EHOSTDOWN) => Self::Unreachable(Reach::Host),
            Some(libc::EACCES | libc::EPERM) => Self::Unreachable(Reach::Prohibited),
            Some(libc::ETIMEDOUT) => Self::TimedOut,
            Some(libc::EMFILE | libc::ENFILE) => Self::Exhausted,
            _ if error.kind() == io::ErrorKind::TimedOut => Self::TimedOut,
            _ if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            _ => Self::Io(error),
        }
    }
}

/// Opens streams through whatever the composition root chose; cuts the cycle between DNS and outbounds.
pub trait Connect: Send + Sync {
    /// Opens a stream to `to`.
    fn connect<'a>(&'a self, to: &'a Address) -> BoxFuture<'a, Result<BoxStream, DialError>>;
}

/// Why a name has no address for us.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum LookupError {
    /// The name does not exist (NXDOMAIN).
    #[error("no such name")]
    NoSuchName,
    /// The name exists, without an address of a family we use.
    #[error("the name has no address")]
    NoAddress,
    /// No nameserver answered in time.
    #[error("no nameserver answered in time")]
    TimedOut,
    /// Every nameserver failed; the text is the last one's failure.
    #[error("{0}")]
    Failed(Arc<str>),
}

/// Finds the real addresses of a name. A fake address never comes out of it.
pub trait Lookup: Send + Sync {
    /// The addresses of `name`, preferred first, never empty.
    fn lookup<'a>(&'a self, name: &'a Name) -> BoxFuture<'a, Result<Arc<[IpAddr]>, LookupError>>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_lower_case_ascii_whatever_it_was_written_in() {
        for (written, name) in [
            ("WWW.Example.TEST.", "www.example.test"),
            ("Bücher.example", "xn--bcher-kva.example"),
            ("例え。テスト", "xn--r8jz45g.xn--zckzah"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("_sip._udp.example", "_sip._udp.example"),
        ] {
            assert_eq!(Name::new(written).unwrap().as_str(), name, "{written}");
        }
    }

    #[test]
    fn a_name_that_grows_on_the_way_keeps_its_limits() {
        // Each of these letters is longer once it is in lower case.
        for letter in ["\u{130}", "\u{23a}"] {
            for many in 1..=80 {
                let Ok(name) = Name::new(&[letter.repeat(many).as_str(); 4].join(".")) else { continue };
                let (name, labels) = (name.as_str(), name.as_str().split('.'));
                assert!(name.is_ascii() && name.len() <= 253, "{many}: {name}");
                assert!(labels.clone().count() == 4 && labels.clone().all(|label| label.len() <= 63), "{many}: {name}");
            }
            assert!(Name::new(&letter.repeat(80)).is_err());
        }
    }

    #[test]
    fn what_stands_for_a_bad_character_is_one() {
        // U+2100 stands for `a/c`, U+3002 for a dot.
        assert!(Name::new("\u{2100}.example").is_err());
        assert!(Name::new("a/\u{df}").is_err());
        assert_eq!(Name::new("a\u{3002}\u{3002}b"), Err(InvalidName::EmptyLabel));
    }

    #[test]
    fn an_address_is_never_taken_for_a_name() {
        for text in ["192.0.2.1", "192.0.2.1.", "[2001:db8::1]", "2001:db8::1", "１９２.0.2.1"] {
            assert!(matches!(Host::parse(text), Ok(Host::Ip(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_name_keeps_its_limits(text in any::<String>(), letters in "[\\PC]{1,40}(\\.[\\PC]{1,70}){0,6}") {
            for text in [text, letters] {
                let Ok(name) = Name::new(&text) else { continue };
                let name = name.as_str();
                prop_assert!(name.is_ascii() && (1..=253).contains(&name.len()), "{name}");
                prop_assert!(name.split('.').all(|label| (1..=63).contains(&label.len())), "{name}");
                prop_assert!(!name.bytes().any(|byte| byte.is_ascii_uppercase()), "{name}");
            }
        }
    }
}
