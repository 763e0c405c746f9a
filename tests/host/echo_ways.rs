//! Ping while the ways out change: a socket that its device has left behind is replaced, any other follows the routes.

use super::change::{BOTH, Internet, NAMESERVERS, profile};
use super::support::Netns;
use super::support::program::{PATIENCE, Program};
use super::support::run;
use super::support::tunproxy::Tunproxy;
use super::support::uplinks::{FIRST, SECOND, Uplinks};
use super::support::world::poll_until;

const TUN: &str = "/dev/net/tun";
const SITES: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];

/// A ping that goes on and on.
struct Ping(Program);

impl Ping {
    fn start(host: &Netns, site: &str) -> Self {
        let mut command = host.command("ping");
        command.args(["-n", "-O", "-i", "0.2", site]);
        Self(Program::start("ping", command))
    }

    /// Waits until it has been answered anew.
    fn goes_on(&self, when: &str, tunproxy: &Tunproxy) {
        let answers = || self.0.output().lines().filter(|line| line.contains("bytes from")).count();
        let before = answers();
        let answered = || (answers() >= before + 2).then_some(());
        assert!(poll_until(PATIENCE, answered).is_some(), "{when}: {}\n{}", self.0.output(), tunproxy.output());
    }
}

#[test]
fn pings_go_on_when_the_interface_that_is_named_was_pulled_out_and_plugged_in_again() {
    run(&["ping", TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        net.default(SECOND, BOTH);
        let place = profile(NAMESERVERS);
        let written = std::fs::read_to_string(&place.profile).unwrap();
        place.rewrite(&format!("interface-name: eth1\n{written}"));
        let tunproxy = place.start(host);
        let pings = SITES.map(|site| Ping::start(host, site));
        pings.iter().for_each(|ping| ping.goes_on("at the start", &tunproxy));
        for _ in 0..2 {
            net.replug_second();
            net.default(SECOND, BOTH);
            pings.iter().for_each(|ping| ping.goes_on("plugged in again", &tunproxy));
            // Another program's first request finds the new socket too.
            SITES.iter().for_each(|site| Ping::start(host, site).goes_on("anew", &tunproxy));
        }
        let ended = tunproxy.output().matches("its interface is gone").count();
        assert!(ended >= 4, "{ended} flows have ended with their device: {}", tunproxy.output());
        assert!(tunproxy.stop().success());
    });
}

#[test]
fn pings_follow_the_default_route_from_one_uplink_to_the_other() {
    run(&["ping", TUN], || {
        let net = Uplinks::new();
        let host = &net.lab.host;
        let _internet = Internet::open(&net.lab);
        let tunproxy = profile(NAMESERVERS).start(host);
        let pings = SITES.map(|site| Ping::start(host, site));
        pings.iter().for_each(|ping| ping.goes_on("at the start", &tunproxy));
        for uplink in [SECOND, FIRST] {
            net.default(uplink, BOTH);
            // Each provider passes on its own addresses alone: an old source would go unanswered.
            pings.iter().for_each(|ping| ping.goes_on(uplink.device, &tunproxy));
        }
        assert!(tunproxy.stop().success());
    });
}
