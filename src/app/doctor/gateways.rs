//! Asking the gateways of the default routes whether they are there, and nobody beyond them.

use std::net::{SocketAddr, SocketAddrV6};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::record::{Probed, Record};
use crate::platform::{Dialer, DirectWay, Family, Gateway, Neighbour, Netlink};

/// How long the kernel asks before it gives a neighbour up: three times, a second apart, and a little for slow hosts.
const PATIENCE: Duration = Duration::from_secs(4);
/// Of neighbours the kernel tells nobody who has no subscription; the answer of a link takes a millisecond or so.
const LOOK: Duration = Duration::from_millis(20);
/// "Discard" (RFC 863): what is sent there asks for nothing.
const DISCARD: u16 = 9;

/// Asks all of them; tells also the ways out that have none. `past`: sockets whose packets go past a run.
pub(super) async fn ask(past: &Dialer, record: &Record) -> (Vec<Probed>, Vec<DirectWay>) {
    let Ok(mut netlink) = Netlink::open() else { return (Vec::new(), Vec::new()) };
    let ways: Vec<_> =
        Family::BOTH.into_iter().map(|family| netlink.default_ways(family).unwrap_or_default()).collect();
    let (found, mut direct): (Vec<_>, Vec<_>) = ways.into_iter().unzip();
    // The TUN is no uplink, and one without a carrier is told of as such.
    let uplinks = record.uplinks();
    let live = |device| uplinks.iter().find(|link| link.index == device && link.up && link.carrier);
    direct.iter_mut().for_each(|of_family| of_family.retain(|way: &DirectWay| live(way.device).is_some()));
    let asked = found.into_iter().flatten().filter_map(|gateway| {
        let link = live(gateway.device)?;
        let dialer = Dialer { interface: Some(link.name.clone()), ..past.clone() };
        Some((gateway, dialer))
    });
    let answered = join_all(
        asked.map(|(gateway, dialer)| async move { Probed { answers: answers(&gateway, &dialer).await, gateway } }),
    );
    (answered.await, direct.concat())
}

/// Whether a gateway answers. The kernel asks, as it would for any packet: for a neighbour that it remembers, if we may have
/// it do so, else on account of an empty datagram.
async fn answers(gateway: &Gateway, dialer: &Dialer) -> Option<bool> {
    let mut netlink = Netlink::open().ok()?;
    let begun = Instant::now();
    let known = netlink.neighbour(gateway).ok()?;
    let verified = match known {
        Some(Neighbour::Fixed) => return None,
        Some(Neighbour::Present | Neighbour::Remembered) => netlink.verify_neighbour(gateway).is_ok(),
        Some(Neighbour::Asked | Neighbour::Absent) | None => false,
    };
    match known {
        _ if verified => {}
        Some(Neighbour::Present) => return Some(true),
        // Who may not have it asked would have to wait for longer than anybody does.
        Some(Neighbour::Remembered) => return None,
        _ => send(gateway, dialer).await?,
    }
    loop {
        let known = netlink.neighbour(gateway).ok()?;
        let late = begun.elapsed() > PATIENCE;
        match known {
            Some(Neighbour::Present) => return Some(true),
            Some(Neighbour::Absent) => return Some(false),
            Some(Neighbour::Asked) if late => return Some(false),
            Some(Neighbour::Fixed) => return None,
            Some(Neighbour::Remembered | Neighbour::Asked) | None if late => return None,
            Some(Neighbour::Remembered | Neighbour::Asked) | None => sleep(LOOK).await,
        }
    }
}

async fn send(gateway: &Gateway, dialer: &Dialer) -> Option<()> {
    let to = match gateway.address {
        std::net::IpAddr::V4(ip) => SocketAddr::from((ip, DISCARD)),
        std::net::IpAddr::V6(ip) => SocketAddrV6::new(ip, DISCARD, 0, gateway.device).into(),
    };
    dialer.udp(to.ip()).ok()?.send_to(&[], to).await.ok().map(drop)
}
