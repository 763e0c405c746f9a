//! Whom a flow is for: names, addresses, and ports with them.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

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
