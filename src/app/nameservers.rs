//! Whom to ask: the profile's nameservers as addresses.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::runtime::Handle;

use crate::dns::{self, Dns, Upstream};
use crate::net::{Address, Host, Lookup};
use crate::platform::Dialer;
use crate::profile::{self, Nameserver};

/// systemd-resolved's list of the nameservers behind its stub.
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";
const SYSTEM: &str = "/etc/resolv.conf";
const PORT: u16 = 53;

/// The usable nameservers, those written as names looked up through `default-nameserver`.
///
/// # Errors
/// None is left.
pub(super) async fn resolve(written: &profile::Dns, dialer: &Dialer) -> anyhow::Result<Vec<Upstream>> {
    let mut upstreams = Vec::new();
    for server in &written.nameserver {
        match server {
            Nameserver::System => upstreams.extend(system()),
            Nameserver::Udp(address) => upstreams.extend(find(address, false, written, dialer).await),
            Nameserver::Tcp(address) => upstreams.extend(find(address, true, written, dialer).await),
        }
    }
    upstreams.dedup();
    if upstreams.is_empty() {
        // Without `nameserver` and without a usable /etc/resolv.conf the addresses for bootstrapping remain.
        upstreams.extend(written.default_nameserver.iter().filter_map(literal));
        tracing::warn!("no nameserver of the system can be used; asking `dns.default-nameserver` instead");
    }
    if upstreams.is_empty() {
        bail!("no nameserver can be used; write their addresses under `dns.nameserver`");
    }
    Ok(upstreams)
}

fn literal(server: &Nameserver) -> Option<Upstream> {
    let (address, tcp_only) = match server {
        Nameserver::Udp(address) => (address, false),
        Nameserver::Tcp(address) => (address, true),
        Nameserver::System => return None,
    };
    Some(Upstream { address: address.socket()?, tcp_only })
}

async fn find(address: &Address, tcp_only: bool, written: &profile::Dns, dialer: &Dialer) -> Option<Upstream> {
    let ip = match &address.host {
        Host::Ip(ip) => *ip,
        Host::Name(name) => match look_up(name, written, dialer).await {
            Ok(ip) => ip,
            Err(error) => {
                tracing::warn!("the nameserver {address} is left out: {error:#}");
                return None;
            }
        },
    };
    Some(Upstream { address: SocketAddr::new(ip, address.port), tcp_only })
}

async fn look_up(name: &crate::net::Name, written: &profile::Dns, dialer: &Dialer) -> anyhow::Result<IpAddr> {
    let bootstrap = Dns::open(dns::Config {
        ipv6: written.ipv6,
        mode: dns::Mode::Mapping,
        upstreams: written.default_nameserver.iter().filter_map(literal).collect(),
        dialer: dialer.clone(),
        log: None,
        runtime: Handle::current(),
    })?;
    let found: Arc<[IpAddr]> = bootstrap.lookup(name).await.context("its name cannot be looked up")?;
    found.first().copied().context("its name has no address")
}

/// What the system asks. A stub on a loopback address cannot be asked: its own questions come back to us.
fn system() -> Vec<Upstream> {
    let listed = read(SYSTEM);
    let usable: Vec<Upstream> = listed.iter().copied().filter(|server| !server.address.ip().is_loopback()).collect();
    if usable.is_empty() { read(RESOLVED) } else { usable }
}

fn read(path: &str) -> Vec<Upstream> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok())
        .map(|ip: IpAddr| Upstream { address: SocketAddr::new(ip, PORT), tcp_only: false })
        .collect()
}
