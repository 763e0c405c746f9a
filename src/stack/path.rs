//! What routers have said of the paths to clients: MTUs smaller than the device's (RFC 1191, RFC 8201).

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// After so long a larger packet is tried again, by the next flow (RFC 1191 section 6.3: ten minutes).
const LIFETIME: Duration = Duration::from_secs(600);
/// Clients remembered; with more the memory starts afresh, which costs each of their flows one lost segment.
const MOST: usize = 1024;
/// No smaller MTU is believed: every link of IPv6 carries that much (RFC 8200 section 5), and every host of IPv4 takes
/// that much (RFC 791).
const LEAST: [u16; 2] = [576, 1280];

/// Path MTUs by client, where one was learned.
#[derive(Default)]
pub(super) struct Paths(HashMap<IpAddr, (u16, Instant), foldhash::fast::RandomState>);

impl Paths {
    /// Notes that the path to `client` carries packets of `mtu` bytes, where the device carries `device`; 0 is what a
    /// router says that cannot tell. Returns the MTU to use from now on.
    pub(super) fn learn(&mut self, client: IpAddr, mtu: u32, device: usize, now: Instant) -> u16 {
        let most = u16::try_from(device).unwrap_or(u16::MAX);
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX).max(LEAST[usize::from(client.is_ipv6())]).min(most);
        let mtu = self.find(client, now).map_or(mtu, |known| known.min(mtu));
        if self.0.len() >= MOST && !self.0.contains_key(&client) {
            self.0.clear();
        }
        self.0.insert(client, (mtu, now + LIFETIME));
        mtu
    }

    /// The MTU of the path to `client`, if it is known to be smaller than the device's.
    pub(super) fn find(&self, client: IpAddr, now: Instant) -> Option<u16> {
        self.0.get(&client).filter(|(_, end)| now < *end).map(|(mtu, _)| *mtu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn a_path_only_shrinks_until_it_is_forgotten() {
        let (mut paths, now) = (Paths::default(), Instant::now());
        assert_eq!(paths.learn(client(1), 1400, 1500, now), 1400);
        assert_eq!(paths.learn(client(1), 1450, 1500, now), 1400);
        assert_eq!(paths.find(client(1), now), Some(1400));
        assert_eq!((paths.find(client(2), now), paths.find(client(1), now + LIFETIME)), (None, None));
        assert_eq!(paths.learn(client(1), 1450, 1500, now + LIFETIME), 1450);
    }

    #[test]
    fn what_every_link_carries_is_never_undercut_and_the_device_never_exceeded() {
        let (mut paths, now) = (Paths::default(), Instant::now());
        let six: IpAddr = "2001:db8::1".parse().unwrap();
        assert_eq!((paths.learn(client(1), 0, 1500, now), paths.learn(six, 0, 1500, now)), (576, 1280));
        assert_eq!(paths.learn(client(2), 1_000_000, 1500, now), 1500);
    }

    #[test]
    fn the_number_of_clients_is_bounded() {
        let (mut paths, now) = (Paths::default(), Instant::now());
        for n in 0..3 * MOST as u32 {
            paths.learn(std::net::Ipv4Addr::from(n).into(), 1400, 1500, now);
        }
        assert!(paths.0.len() <= MOST);
    }
}
