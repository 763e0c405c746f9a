//! The chain that keeps forged sources out of the TUN, and answers to them in.

use std::net::IpAddr;

use ipnet::IpNet;

use super::super::layout::PRIVATE;
use super::{Writer, chain, family};

/// A source that the kernel has a way back to, and that is neither its own nor a group's.
const SOMEBODY: &str = "fib saddr type unicast";
/// The way back to a source is by the interface that its packet came from (RFC 3704 section 2.2). As a packet out of the
/// TUN would find it, which is how the answer goes.
const WAY_BACK: &str = "fib saddr . iif oif exists";

impl Writer<'_> {
    /// A client may write any source into a packet. What we answer goes there: to a stranger behind the uplink, past the
    /// TUN, if nobody looks. So nothing of ours leaves by an uplink but to those on its link, who may have this host as
    /// their gateway; and into the TUN comes only who is where he says. The first packet of a connection decides, since
    /// one that is dropped here begins none.
    pub(super) fn forged(&self) -> String {
        let (uplinks, _) = self.links_apart();
        let by_uplink =
            |word: &str, comparison: &str| uplinks.as_ref().map(|names| format!("{word} {comparison}{{ {names} }} "));
        // To a port forward of the administrator's own that leads to a fake address, strangers do come: by an uplink.
        let mut lines = vec![format!("{} ct status dnat return", self.iif_tun())];
        if let Some(out) = by_uplink("oifname", "") {
            let answer = format!("{} {out}", self.iif_tun());
            lines.extend(of_nets("daddr != ", self.on_uplinks()).map(|nets| format!("{answer}{nets} counter drop")));
        }
        if self.survey.parameters.finds_ways_back {
            lines.push(format!("{} return", self.oif_tun("!= ")));
            lines.push("ct state established return".to_owned());
            lines.extend(by_uplink("iifname", "").map(|here| format!("{here}ct status dnat return")));
            let elsewhere = by_uplink("iifname", "!= ").unwrap_or_default();
            lines.push(format!("{elsewhere}{WAY_BACK} return"));
            if let Some(here) = by_uplink("iifname", "") {
                lines
                    .extend(of_nets("saddr ", self.on_uplinks()).map(|nets| format!("{here}{nets} {SOMEBODY} return")));
            }
            // By two interfaces in one network, who comes by one may be answered by the other.
            let own = of_nets("saddr ", self.survey.own_networks().into_iter().collect());
            lines.extend(own.map(|nets| format!("{nets} {SOMEBODY} return")));
            lines.push("counter drop".to_owned());
        }
        chain("forged", "filter hook forward priority filter - 2", &lines)
    }

    /// Who may be a client that comes by an uplink: those on its link, and, where the link's router has more networks,
    /// private addresses.
    fn on_uplinks(&self) -> Vec<IpNet> {
        let private = PRIVATE.into_iter().filter_map(|net| net.parse().ok());
        private.chain(self.survey.uplink_networks()).collect()
    }
}

/// What selects packets by `side` (`saddr` or `daddr`, with a comparison): one for each family that has such nets.
pub(super) fn of_nets(side: &str, nets: Vec<IpNet>) -> impl Iterator<Item = String> {
    // Overlaps are an error to nft.
    let nets = IpNet::aggregate(&nets.into_iter().map(|net| net.trunc()).collect());
    let (v4, v6): (Vec<IpNet>, Vec<IpNet>) = nets.into_iter().partition(|net| matches!(net, IpNet::V4(_)));
    let select = move |nets: &Vec<IpNet>| {
        let first: IpAddr = nets.first()?.addr();
        let list = nets.iter().map(IpNet::to_string).collect::<Vec<_>>().join(", ");
        Some(format!("{} {side}{{ {list} }}", family(first)))
    };
    [v4, v6].iter().filter_map(select).collect::<Vec<_>>().into_iter()
}
