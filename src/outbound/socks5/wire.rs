//! The bytes of SOCKS5 (RFC 1928), for both ends of it. tokio-socks speaks CONNECT only, and only as a client.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::net::{Address, Host};

/// Protocol version.
pub const VERSION: u8 = 5;
/// Version of the user/password sub-negotiation (RFC 1929).
pub const PASSWORD_VERSION: u8 = 1;

/// Authentication methods (RFC 1928 section 3).
pub mod method {
    /// None is required.
    pub const NONE: u8 = 0x00;
    /// User name and password.
    pub const PASSWORD: u8 = 0x02;
    /// None of those offered will do.
    pub const UNACCEPTABLE: u8 = 0xff;
}

/// Commands (section 4).
pub mod command {
    /// Open a TCP connection.
    pub const CONNECT: u8 = 1;
    /// Relay datagrams for as long as this connection lives.
    pub const UDP_ASSOCIATE: u8 = 3;
}

/// Reply codes (section 6).
pub mod reply {
    /// It worked.
    pub const SUCCEEDED: u8 = 0;
    /// General failure.
    pub const FAILURE: u8 = 1;
    /// The rule set does not allow it.
    pub const NOT_ALLOWED: u8 = 2;
    /// Network unreachable.
    pub const NETWORK_UNREACHABLE: u8 = 3;
    /// Host unreachable.
    pub const HOST_UNREACHABLE: u8 = 4;
    /// Connection refused.
    pub const REFUSED: u8 = 5;
    /// TTL expired; what proxies say of a timeout.
    pub const TTL_EXPIRED: u8 = 6;
    /// Command not supported.
    pub const COMMAND_UNSUPPORTED: u8 = 7;
    /// Address type not supported.
    pub const ADDRESS_UNSUPPORTED: u8 = 8;
}

const ATYP_IPV4: u8 = 1;
const ATYP_NAME: u8 = 3;
const ATYP_IPV6: u8 = 4;

/// Room for the largest header of a datagram: RSV, FRAG, ATYP, a name of 255 bytes, port.
pub const MAX_HEADER: usize = 3 + 1 + 1 + 255 + 2;

/// Why bytes are no SOCKS address or datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes end too early.
    #[error("the message is cut short")]
    Short,
    /// The address type is none of RFC 1928's three.
    #[error("address type {0} is not known")]
    AddressType(u8),
    /// The name is no domain name.
    #[error("the address is no domain name")]
    Name,
    /// The datagram is part of a larger one; RFC 1928 section 7 lets us drop those.
    #[error("fragments are not supported")]
    Fragment,
}

impl From<WireError> for io::Error {
    fn from(error: WireError) -> Self {
        let kind = if error == WireError::Short { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
        Self::new(kind, error)
    }
}

/// Appends ATYP, address and port.
pub fn put_address(to: &Address, out: &mut Vec<u8>) {
    match &to.host {
        Host::Ip(IpAddr::V4(ip)) => {
            out.push(ATYP_IPV4);
            out.extend_from_slice(&ip.octets());
        }
        Host::Ip(IpAddr::V6(ip)) => {
            out.push(ATYP_IPV6);
            out.extend_from_slice(&ip.octets());
        }
        Host::Name(name) => {
            let name = name.as_str().as_bytes();
            // A Name has at most 253 bytes in lower case; should case mapping ever lengthen one, it is cut.
            let length = u8::try_from(name.len()).unwrap_or(u8::MAX);
            out.extend_from_slice(&[ATYP_NAME, length]);
            out.extend_from_slice(&name[..usize::from(length)]);
        }
    }
    out.extend_from_slice(&to.port.to_be_bytes());
}

/// Reads ATYP, address and port from the front of `bytes`, and how many bytes that took.
///
/// # Errors
/// [`WireError`] other than `Fragment`.
pub fn take_address(bytes: &[u8]) -> Result<(Address, usize), WireError> {
    let (&kind, rest) = bytes.split_first().ok_or(WireError::Short)?;
    let (host, used) = match kind {
        ATYP_IPV4 => {
            let octets: [u8; 4] = *rest.first_chunk().ok_or(WireError::Short)?;
            (Host::Ip(IpAddr::V4(Ipv4Addr::from(octets))), 4)
        }
        ATYP_IPV6 => {
            let octets: [u8; 16] = *rest.first_chunk().ok_or(WireError::Short)?;
            // What a dual-stack socket writes for an IPv4 peer is that IPv4 peer.
            (Host::Ip(IpAddr::V6(Ipv6Addr::from(octets)).to_canonical()), 16)
        }
        ATYP_NAME => {
            let (&length, rest) = rest.split_first().ok_or(WireError::Short)?;
            let name = rest.get(..usize::from(length)).ok_or(WireError::Short)?;
            let name = std::str::from_utf8(name).map_err(|_| WireError::Name)?;
            (Host::parse(name).map_err(|_| WireError::Name)?, 1 + usize::from(length))
        }
        other => return Err(WireError::AddressType(other)),
    };
    let port: [u8; 2] = *rest.get(used..).and_then(<[u8]>::first_chunk).ok_or(WireError::Short)?;
    Ok((Address { host, port: u16::from_be_bytes(port) }, 1 + used + 2))
}

/// Reads ATYP, address and port from a stream, and not a byte more.
///
/// # Errors
/// Those of the stream, and [`WireError`] as `InvalidData`.
pub async fn read_address(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Address> {
    let mut bytes = [0; 1 + 1 + 255 + 2];
    stream.read_exact(&mut bytes[..2]).await?;
    let length = match bytes[0] {
        ATYP_IPV4 => 1 + 4 + 2,
        ATYP_IPV6 => 1 + 16 + 2,
        ATYP_NAME => 1 + 1 + usize::from(bytes[1]) + 2,
        other => return Err(WireError::AddressType(other).into()),
    };
    stream.read_exact(&mut bytes[2..length]).await?;
    Ok(take_address(&bytes[..length])?.0)
}

/// Appends a reply (section 6): version, code, reserved, bound address.
pub fn put_reply(code: u8, bound: SocketAddr, out: &mut Vec<u8>) {
    out.extend_from_slice(&[VERSION, code, 0]);
    put_address(&bound.into(), out);
}

/// Appends the header of a datagram (section 7) to or from `peer`; the payload follows.
pub fn put_datagram_header(peer: &Address, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0, 0]);
    put_address(peer, out);
}

/// Splits a datagram (section 7) into its peer and its payload.
///
/// # Errors
/// [`WireError`].
pub fn take_datagram(bytes: &[u8]) -> Result<(Address, &[u8]), WireError> {
    let header: [u8; 3] = *bytes.first_chunk().ok_or(WireError::Short)?;
    if header[2] != 0 {
        return Err(WireError::Fragment);
    }
    let (peer, used) = take_address(&bytes[3..])?;
    Ok((peer, &bytes[3 + used..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_address() -> impl Strategy<Value = Address> {
        let v4 = any::<[u8; 4]>().prop_map(|octets| Host::Ip(IpAddr::from(octets)));
        let v6 = any::<[u8; 16]>().prop_map(|octets| Host::Ip(IpAddr::from(octets).to_canonical()));
        let name = "[a-z]{1,20}(\\.[a-z0-9-]{1,20}){0,9}".prop_map(|name| Host::parse(&name).unwrap());
        (prop_oneof![v4, v6, name], any::<u16>()).prop_map(|(host, port)| Address { host, port })
    }

    proptest! {
        #[test]
        fn a_datagram_keeps_its_peer_and_payload(peer in any_address(), payload in any::<Vec<u8>>()) {
            let mut bytes = Vec::new();
            put_datagram_header(&peer, &mut bytes);
            prop_assert!(bytes.len() <= MAX_HEADER);
            bytes.extend_from_slice(&payload);
            prop_assert_eq!(take_datagram(&bytes), Ok((peer, &payload[..])));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in any::<Vec<u8>>(), kind in 0_u8..6) {
            let _ = take_datagram(&bytes);
            let mut typed = vec![0, 0, 0, kind];
            typed.extend_from_slice(&bytes);
            let _ = take_datagram(&typed);
        }

        #[test]
        fn what_is_cut_short_is_said_to_be(peer in any_address(), cut in 1_usize..8) {
            let mut bytes = Vec::new();
            put_datagram_header(&peer, &mut bytes);
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            prop_assert_eq!(take_datagram(&bytes), Err(WireError::Short));
        }
    }

    #[test]
    fn fragments_and_foreign_address_types_are_told_apart() {
        assert_eq!(take_datagram(&[0, 0, 1, 1, 127, 0, 0, 1, 0, 53]), Err(WireError::Fragment));
        assert_eq!(take_datagram(&[0, 0, 0, 2, 127, 0, 0, 1, 0, 53]), Err(WireError::AddressType(2)));
        assert_eq!(take_datagram(&[0, 0, 0, 3, 2, b'a', b' ', 0, 53]), Err(WireError::Name));
    }

    #[test]
    fn an_address_written_as_a_name_is_an_address() {
        let (peer, _) = take_datagram(b"\0\0\0\x03\x0810.0.0.1\0\x35").unwrap();
        assert_eq!(peer, SocketAddr::from(([10, 0, 0, 1], 53)).into());
    }

    #[tokio::test]
    async fn reading_an_address_takes_no_byte_too_many() {
        let mut bytes = Vec::new();
        let to = Address { host: Host::parse("example.org").unwrap(), port: 443 };
        put_address(&to, &mut bytes);
        bytes.extend_from_slice(b"early data");
        let mut stream = &bytes[..];
        assert_eq!(read_address(&mut stream).await.unwrap(), to);
        assert_eq!(stream, b"early data");
    }
}
