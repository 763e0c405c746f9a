//! From a profile to the parts that run it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use arc_swap::ArcSwap;
use ipnet::{IpNet, Ipv4Net};
use tokio::runtime::Handle;

use super::worker::Tun;
use super::{load, nameservers};
use crate::dispatch::{Core, Counters, Router};
use crate::dns::{self, Dns, Filter, Wildcards};
use crate::inbound::tun::{Crew, Hijack};
use crate::net::{Lookup, client_of};
use crate::outbound::{Context, Egress, Outbounds, Roots};
use crate::platform::{self, Dialer, Framing, TunQueue, descriptors_for_flows};
use crate::profile::{EnhancedMode, FilterMode, Profile, Report};
use crate::stack;

/// The addresses on the device and beside it.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    /// Ours on the device, with their prefixes.
    pub(super) device: Vec<IpNet>,
    /// Where names are answered: the addresses beside ours.
    pub(super) dns: Vec<IpAddr>,
    /// The fake ranges.
    pub(super) fake: Vec<IpNet>,
}

impl Addresses {
    /// As in mihomo: the first address of the fake range is the device's, the second answers names.
    pub(super) fn of(profile: &Profile) -> Self {
        let range = profile.dns.fake_ip_range;
        let base = u32::from(range.network());
        let v4 = Ipv4Net::new_assert((base + 1).into(), 30);
        let mut device = vec![IpNet::V4(v4)];
        let mut dns = vec![IpAddr::V4((base + 2).into())];
        for v6 in &profile.tun.inet6_address {
            device.push(IpNet::V6(*v6));
            // The profile has no address without one behind it.
            dns.push(IpAddr::V6(u128::from(v6.addr()).saturating_add(1).into()));
        }
        let mut fake = vec![IpNet::V4(range)];
        fake.extend(profile.dns.fake_ip_range6.map(IpNet::V6));
        Self { device, dns, fake }
    }

    /// What a stack must know, on a device with or without offloads, alone or among several.
    fn stack(&self, profile: &Profile, offload: bool, several: bool) -> stack::Config {
        let own: Vec<IpAddr> = self.device.iter().map(IpNet::addr).collect();
        let reserved = self.fake.iter().chain(&self.device).map(IpNet::trunc).collect();
        stack::Config {
            mtu: usize::from(profile.tun.mtu),
            offload,
            own,
            echo: self.dns.clone(),
            carry_echo: !profile.tun.disable_icmp_forwarding,
            reserved,
            ipv6: profile.ipv6,
            seed: seed(),
            memory: usize::MAX,
            client: client_of,
            handshakes: usize::MAX,
            tell_ended: several,
        }
    }

    /// What the workers of `queues` need, one each.
    pub(super) fn tuns(&self, profile: &Profile, queues: Vec<TunQueue>) -> Vec<Tun> {
        let several = queues.len() > 1;
        let crew = Crew::of(queues.len());
        // Each worker keeps its own account: nothing is shared on the way of a packet.
        let memory = Memory::of(profile).flows / queues.len().max(1);
        let handshakes = handshakes(descriptors_for_flows(), queues.len());
        let tun = |(queue, crew): (TunQueue, Crew)| {
            let offload = queue.framing() != Framing::Plain;
            let stack = stack::Config { memory, handshakes, ..self.stack(profile, offload, several) };
            Tun { queue, stack, hijack: self.hijack(profile), crew }
        };
        queues.into_iter().zip(crew).map(tun).collect()
    }

    fn hijack(&self, profile: &Profile) -> Hijack {
        let listed: Vec<_> = profile.tun.dns_hijack.iter().map(|target| (target.address, target.port)).collect();
        Hijack::new(listed, &self.dns)
    }
}

/// How many handshakes one client may have under way on each of `workers`, where flows may take so many descriptors: on all
/// together a quarter of these. Each is a dial, and so a descriptor.
fn handshakes(descriptors: u64, workers: usize) -> usize {
    (usize::try_from(descriptors / 4).unwrap_or(usize::MAX) / workers.max(1)).max(8)
}

/// Where our own sockets are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outside {
    /// On the host whose traffic we carry: what they send to a fake address comes back to us.
    Shared,
    /// Around the private namespace whose traffic we carry. The fake addresses inside are nobody's there, or those of
    /// another run, which the host's own traffic goes through.
    Apart,
}

/// What `memory-limit` comes to, in bytes.
struct Memory {
    /// For the flows of the TUN, on all workers together.
    flows: usize,
    /// For datagrams and their associations.
    datagrams: usize,
}

impl Memory {
    fn of(profile: &Profile) -> Self {
        let limit = usize::try_from(memory_limit(profile)).unwrap_or(usize::MAX);
        Self { flows: limit / 4 * 3, datagrams: limit / 4 }
    }
}

/// `memory-limit` in bytes: a quarter of what this process could have, unless the profile says something else.
pub(super) fn memory_limit(profile: &Profile) -> u64 {
    let share = || platform::memory().map_or(FALLBACK, |all| all / 4).max(FALLBACK);
    profile.memory_limit.unwrap_or_else(share)
}

/// The limit where nobody says how much memory there is, and the least that is taken by default, in bytes.
const FALLBACK: u64 = 32 << 20;

/// Sixty-four bits that nobody can guess.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    // Keyed from the operating system's entropy; the counter-like input only separates calls.
    RandomState::new().hash_one(std::time::SystemTime::now())
}

/// Builds DNS, outbounds and router. `log` keeps fake addresses over restarts. Without `ipv6`, names have no IPv6
/// addresses, whatever the profile says.
///
/// # Errors
/// The fake range is too small, or the profile has mistakes that [`load::load`] would have told.
pub(super) async fn core(
    profile: &Profile,
    outside: Outside,
    mut dialer: Dialer,
    log: Option<PathBuf>,
    ipv6: bool,
) -> anyhow::Result<Arc<Core>> {
    let addresses = Addresses::of(profile);
    if outside == Outside::Shared {
        dialer.fake.clone_from(&addresses.fake);
    }
    dialer.interface.clone_from(&profile.interface_name);
    let own = dialer.own.clone();
    let tracers = Arc::default();
    let nameservers = nameservers::find(profile, &addresses, &dialer, &tracers)?;
    let dns = Dns::open(dns::Config {
        ipv6: profile.dns.ipv6 && ipv6,
        mode: mode(profile)?,
        nameservers,
        tracers,
        dialer: dialer.clone(),
        log,
        runtime: Handle::current(),
    })
    .context("the fake-IP range cannot be used")?;
    let dns = Arc::new(dns);
    let lookup: Arc<dyn Lookup> = dns.clone();
    let context = Context { egress: Egress::new(dialer, lookup), roots: Roots::default() };
    let mut report = Report::new("", "");
    let outbounds = load::outbounds(profile, &context, &mut report);
    if report.has_errors() {
        return Err(anyhow!("the profile has errors"));
    }
    let router = router(profile, &outbounds)?;
    Ok(Arc::new(Core {
        router: ArcSwap::from_pointee(router),
        outbounds: Arc::new(outbounds),
        dns,
        counters: Arc::new(Counters::default()),
        udp_timeout: profile.tun.udp_timeout,
        icmp_timeout: profile.tun.icmp_timeout,
        echo_ids: Arc::default(),
        own,
        carried: Arc::default(),
        mappings: Arc::default(),
        memory: Memory::of(profile).datagrams,
    }))
}

/// Builds what needs neither the host nor a nameserver, and throws it away: what fails here would fail in a run.
///
/// # Errors
/// As [`core`].
pub(super) fn rehearse(profile: &Profile, outbounds: &Outbounds) -> anyhow::Result<()> {
    mode(profile)?;
    router(profile, outbounds)?;
    Ok(())
}

fn router(profile: &Profile, outbounds: &Outbounds) -> anyhow::Result<Router> {
    let rules = profile.rules.iter().map(|placed| placed.rule.clone()).collect();
    Ok(Router::new(profile.mode, rules, |name| outbounds.index(name))?)
}

pub(super) fn mode(profile: &Profile) -> anyhow::Result<dns::Mode> {
    let written = &profile.dns;
    match written.enhanced_mode {
        EnhancedMode::FakeIp if written.enable => {}
        EnhancedMode::Normal if written.enable => return Ok(dns::Mode::Plain),
        _ => return Ok(dns::Mode::Mapping),
    }
    let mut wildcards = Wildcards::default();
    for pattern in &written.fake_ip_filter {
        wildcards.insert(pattern).with_context(|| format!("dns.fake-ip-filter: `{pattern}`"))?;
    }
    let filter_mode = match written.fake_ip_filter_mode {
        FilterMode::Blacklist => dns::FilterMode::Blacklist,
        FilterMode::Whitelist => dns::FilterMode::Whitelist,
    };
    Ok(dns::Mode::FakeIp {
        range: written.fake_ip_range,
        range6: written.fake_ip_range6,
        filter: Filter::new(wildcards, filter_mode),
        ttl: written.fake_ip_ttl,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_may_dial_with_a_quarter_of_the_descriptors() {
        for (descriptors, workers, each) in [(192, 2, 24), (960, 1, 240), (192, 16, 8), (1 << 20, 4, 1 << 16)] {
            assert_eq!(handshakes(descriptors, workers), each, "{descriptors} for {workers}");
        }
    }
}
