//! Other tunnels that start while we run. Their rules come before ours, and their carriers' marks are news to us.

use super::neighbours::carrier::{Carrier, NEAR_V4, NEAR_V6};
use super::neighbours::tunnels::{carries, count_marks, counted, wg_quick};
use super::neighbours::{TUN, both_rp_filters, profile};
use super::support::client::act_in;
use super::support::program::PATIENCE;
use super::support::sites::{V4, V6};
use super::support::topology::{HOST_V4, HOST_V6};
use super::support::{Dump, Sites, Topology, run, world};

#[test]
fn wireguard_that_comes_later_carries_what_we_send_and_goes_again() {
    run(&["curl", TUN], || {
        both_rp_filters(Topology::desktop, |lab| {
            let _sites = Sites::open(&lab);
            let tunproxy = profile("", "'DST-PORT,81,REJECT', 'MATCH,DIRECT'").start(&lab.host);
            carries(&lab.host, [HOST_V4, HOST_V6]);
            let wg = Carrier::start(&lab.host, "wg0", Some(0xca6c), &lab.internet, "203.0.113.51:51820");
            wg_quick(&lab.host);
            count_marks(&lab.host, 51820, 0xca6c);
            // Rules decide again, and what they send DIRECT takes the new tunnel.
            let ours = || {
                let refused =
                    |site| act_in(&lab.host, &format!("connect {site}:81 2")) == Err("ECONNREFUSED".to_owned());
                [V4, V6].into_iter().all(refused).then_some(())
            };
            assert!(world::poll_until(PATIENCE, ours).is_some(), "{}", tunproxy.output());
            carries(&lab.host, [NEAR_V4, NEAR_V6]);
            assert!(counted(&lab.host, "right") > 0);
            assert_eq!(counted(&lab.host, "wrong"), 0);
            let with_both = Dump::take(&lab.host);
            drop(wg);
            for family in ["-4", "-6"] {
                lab.host.ip(&format!("{family} rule del not fwmark 0xca6c table 51820"));
                lab.host.ip(&format!("{family} rule del table main suppress_prefixlength 0"));
            }
            assert_ne!(with_both.diff(&Dump::take(&lab.host)), "");
            assert!(world::poll_until(PATIENCE, ours).is_some(), "{}", tunproxy.output());
            carries(&lab.host, [HOST_V4, HOST_V6]);
            assert!(tunproxy.stop().success());
        });
    });
}
