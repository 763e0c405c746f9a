use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tunproxy::platform::{Family, MarkMatch, Netlink, Ports, Route, RouteKind, RouteTable, Rule, RuleAction, Survey};

use crate::host::build;
use crate::sandbox::sh;
use crate::support::program::PATIENCE;
use crate::support::{run, world};

#[test]
fn links_and_addresses_are_made_as_asked() {
    run(&[], || {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_veth("left", "right").unwrap();
        netlink.set_mtu("left", 1400).unwrap();
        netlink.set_no_link_local("left").unwrap();
        netlink.set_noarp("left").unwrap();
        netlink.link_up("left").unwrap();
        netlink.link_up("right").unwrap();
        netlink.add_address("left", "198.18.0.1/30".parse().unwrap()).unwrap();
        netlink.add_address("left", "fdfe::1/126".parse().unwrap()).unwrap();
        let shown = sh("ip -d link show dev left; ip -d addr show dev left");
        for wanted in ["mtu 1400", "NOARP", "UP", "addrgenmode none", "inet 198.18.0.1/30", "inet6 fdfe::1/126"] {
            assert!(shown.contains(wanted), "{wanted} in {shown}");
        }
        assert!(shown.contains("nodad") && shown.contains("noprefixroute"), "{shown}");
        assert!(!shown.contains("fe80::"), "{shown}");
        assert!(netlink.links().unwrap().iter().any(|link| link.name == "right"));
        assert!(netlink.addresses().unwrap().iter().any(|(_, net)| net.to_string() == "198.18.0.1/30"));

        netlink.delete_address("left", "198.18.0.1/30".parse().unwrap()).unwrap();
        let again = netlink.delete_address("left", "198.18.0.1/30".parse().unwrap()).unwrap_err();
        assert!(again.is_gone(), "{again}");
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        netlink.move_to_netns("right", &namespace).unwrap();
    });
}

#[test]
fn an_interface_is_found_where_no_descriptor_is_left_and_one_that_is_not_there_is_not() {
    run(&[], || {
        let netlink = Netlink::open().unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
        let (found, missing) = (netlink.index("lo"), netlink.index("nobody0"));
        let long = netlink.index("a-name-longer-than-an-interface's");
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert_eq!(found.unwrap(), 1);
        assert!(missing.unwrap_err().is_gone() && long.unwrap_err().is_gone());
    });
}

#[test]
fn every_selector_of_a_rule_reaches_the_kernel_and_comes_back() {
    run(&[], || {
        let mut netlink = Netlink::open().unwrap();
        let end = Rule::new(Family::V4, 9090, RuleAction::Nop);
        let full = Rule {
            from: Some("0.0.0.0/32".parse().unwrap()),
            to: Some("10.0.0.0/8".parse().unwrap()),
            iif: Some("lo".to_owned()),
            mark: Some(MarkMatch { mark: 0x10, mask: 0x30 }),
            protocol: Some(17),
            destination_ports: Some(Ports { first: 53, last: 53 }),
            suppress_prefix_length: Some(7),
            ..Rule::new(Family::V4, 9001, RuleAction::Lookup(RouteTable(2022)))
        };
        let onward = Rule { oif: Some("tun7".to_owned()), ..Rule::new(Family::V4, 9002, RuleAction::Goto(9090)) };
        let v6 = Rule { from: Some("::/1".parse().unwrap()), family: Family::V6, ..onward.clone() };
        let all = [end, full, onward, v6];
        for rule in &all {
            netlink.add_rule(rule).unwrap();
            assert!(netlink.rules(rule.family).unwrap().contains(rule), "{rule}");
        }
        let shown = sh("ip -d rule");
        assert!(shown.contains("9001:\tfrom 0.0.0.0 to 10.0.0.0/8 fwmark 0x10/0x30 iif lo ipproto udp dport 53 lookup 2022 suppress_prefixlength 7 proto kernel"), "{shown}");
        let twice = netlink.add_rule(&all[1]).unwrap_err();
        assert_eq!(twice.source.raw_os_error(), Some(libc::EEXIST), "{twice}");
        for rule in &all {
            netlink.delete_rule(rule).unwrap();
            assert!(netlink.delete_rule(rule).unwrap_err().is_gone());
        }
    });
}

#[test]
fn routes_come_and_go_in_a_table_of_their_own() {
    run(&[], || {
        let mut netlink = Netlink::open().unwrap();
        netlink.create_veth("left", "right").unwrap();
        for end in ["left", "right"] {
            // The kernel takes its time with link-local addresses, and their routes would come in between.
            netlink.set_no_link_local(end).unwrap();
            netlink.link_up(end).unwrap();
        }
        // By then the kernel has given both ends their multicast routes for the second time: it does that a while after each
        // has a carrier, before it says so.
        let up = || (sh("ip -o link show up").matches("state UP").count() == 2).then_some(());
        world::poll_until(PATIENCE, up).expect("two ends with a carrier");
        let before = sh("ip route show table all; ip -6 route show table all");
        for prefix in ["0.0.0.0/0", "203.0.113.0/28", "::/0", "2001:db8:9::/64"] {
            let to: ipnet::IpNet = prefix.parse().unwrap();
            let kind = if to.prefix_len() == 0 { RouteKind::Device("left".to_owned()) } else { RouteKind::Throw };
            let route = Route { table: RouteTable(2022), to, kind, metric: 1024 };
            netlink.add_route(&route).unwrap();
            let found = netlink.routes(Family::of(&to), |seen| seen.table == RouteTable(2022)).unwrap();
            assert!(found.iter().any(|seen| seen.to == to), "{found:?}");
            netlink.delete_route(&route).unwrap();
            assert!(netlink.delete_route(&route).unwrap_err().is_gone());
        }
        assert_eq!(sh("ip route show table all; ip -6 route show table all"), before);
        netlink.add_default_route("left", Family::V4).unwrap();
        let default = sh("ip route show default");
        assert!(default.contains("default dev left") && default.contains("congctl reno"), "{default}");
    });
}

#[test]
fn every_way_out_of_a_default_route_with_several_is_an_uplink() {
    run(&[], || {
        build("");
        sh("ip route replace default nexthop via 192.0.2.1 dev eth0 nexthop via 192.168.7.9 dev lan0
            ip -6 route del default
            ip -6 route add default nexthop via 2001:db8:1::1 dev eth0 nexthop via 2001:db8:2::1 dev eth1");
        let survey = Survey::take().unwrap();
        let uplinks = survey.uplinks();
        let mut names: Vec<&str> = uplinks.iter().filter_map(|index| survey.link_name(*index)).collect();
        names.sort_unstable();
        assert_eq!(names, ["eth0", "eth1", "lan0"]);
        assert!(survey.own_networks().is_empty(), "{:?}", survey.own_networks());
    });
}
