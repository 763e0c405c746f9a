use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::rules::{NOT_YET, TYPES};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn good(text: &str) -> Profile {
    let (profile, report) = read("p.yaml", text.as_bytes());
    assert!(!report.has_errors(), "{report}");
    profile.unwrap()
}

fn said(text: &str) -> String {
    read("p.yaml", text.as_bytes()).1.to_string()
}

fn yaml_files(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")).collect();
    files.sort();
    assert!(!files.is_empty(), "no profiles in {}", folder.display());
    files
}

#[test]
fn the_gateway_answers_names_on_its_lan_address_and_forwards() {
    let profile = load(&root().join("profiles/gateway.yaml")).0.unwrap();
    assert!(profile.tun.auto_forward && profile.dns.enable);
    assert_eq!(profile.dns.listen.map(|listen| listen.ip()), profile.listen.bind_address);
}

#[test]
fn the_rule_sets_that_we_ship_have_the_form_of_their_behavior() {
    for path in yaml_files(&root().join("rules")) {
        let text = fs::read_to_string(&path).unwrap();
        let mut report = Report::new(path.display().to_string(), &*text);
        let payload = parse(&mut report).unwrap().child("payload").cloned().unwrap();
        let behavior = ["ipcidr", "domain", "classical"].into_iter().find(|name| text.contains(&format!("`{name}`")));
        for item in payload.items() {
            let entry = item.text().unwrap();
            let fine = match behavior.unwrap() {
                "ipcidr" => entry.parse::<ipnet::IpNet>().is_ok(),
                "domain" => entry.starts_with("+."),
                _ => matches!(crate::rules::parse(&format!("{entry},X")), Ok(crate::rules::Line::Rule(_))),
            };
            assert!(fine, "{}: {entry}", path.display());
        }
        assert!(!payload.items().is_empty() && report.is_empty());
    }
}

#[test]
fn numbers_that_cannot_be_are_told_where_they_stand() {
    let text = "tun:\n  iproute2-rule-index: 40000\n  iproute2-table-index: 254\nrules: ['MATCH,DIRECT']\n";
    let told = said(text);
    for words in ["p.yaml:2:24", "would come too late", "from 1 to 32666", "p.yaml:3:25", "table of the kernel's own"] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let numbers = |text: &str| (good(text).tun.rule_index, good(text).tun.table_index);
    assert_eq!(numbers(text), (9000, 2022));
    let zero = "tun: { iproute2-rule-index: 0, iproute2-table-index: 0 }\nrules: ['MATCH,DIRECT']\n";
    assert_eq!((numbers(zero), said(zero).contains("iproute2")), ((9000, 2022), false));
    let last = "tun: { iproute2-rule-index: 32666, iproute2-table-index: 1 }\nrules: ['MATCH,DIRECT']\n";
    assert_eq!(numbers(last), (32666, 1));
}

#[test]
fn a_profile_of_rules_alone_has_mihomos_defaults_and_ours() {
    let profile = good("rules: ['MATCH,DIRECT']");
    assert_eq!((profile.mode, profile.log_level, profile.ipv6), (Mode::Rule, LogLevel::Info, true));
    assert!(!profile.tun.enable && profile.tun.auto_route && profile.tun.auto_detect_interface);
    assert_eq!((profile.tun.mtu, profile.tun.udp_timeout.as_secs()), (1500, 300));
    assert_eq!(profile.tun.dns_hijack, [Hijack { address: None, port: 53 }]);
    assert!(!profile.dns.enable);
    assert_eq!(profile.dns.enhanced_mode, EnhancedMode::RedirHost);
    assert_eq!(profile.dns.fake_ip_range.to_string(), "198.18.0.1/16");
    assert_eq!(profile.dns.fake_ip_range6.unwrap().to_string(), "fdfe:dcba:9877::/64");
    assert_eq!(profile.dns.nameserver, [Nameserver::System]);
    assert_eq!(profile.listen.lan_allowed_ips.len(), 2);
}

#[test]
fn a_size_is_written_as_people_write_it_and_no_smaller_than_can_work() {
    let limit = |text: &str| good(&format!("memory-limit: {text}\nmode: direct\n")).memory_limit;
    for text in ["64MB", "64 MiB", "65536k", "67108864", "'64m'"] {
        assert_eq!(limit(text), Some(64 << 20), "{text}");
    }
    assert_eq!((limit("2GB"), limit("0"), good("mode: direct\n").memory_limit), (Some(2 << 30), None, None));
    for (text, words) in [("8MB", "16MB is the least"), ("64 bananas", "a size such as"), ("-1", "a size such as")] {
        let report = said(&format!("memory-limit: {text}\nmode: direct\n"));
        assert!(report.contains(words), "{text}: {report}");
    }
}

#[test]
fn aaaa_has_answers_unless_one_of_the_two_switches_is_off() {
    let range6 = |text: &str| good(&format!("{text}\nrules: ['MATCH,DIRECT']")).dns.fake_ip_range6;
    assert!(range6("dns: {enable: false}").is_some());
    assert!(range6("dns: {ipv6: true}").is_some());
    assert!(range6("dns: {ipv6: false}").is_none());
    assert!(range6("ipv6: false").is_none());
    assert!(range6("ipv6: false\ndns: {ipv6: true}").is_none());
}

#[test]
fn hijack_takes_any_scheme_and_every_way_to_say_any() {
    let text = "tun: {dns-hijack: ['any:53', 'tcp://any:853', '0.0.0.0:53', '[::]:53', 'udp://8.8.8.8:53']}\n";
    let any = |port| Hijack { address: None, port };
    let one = Hijack { address: Some([8, 8, 8, 8].into()), port: 53 };
    assert_eq!(good(text).tun.dns_hijack, [any(53), any(853), any(53), any(53), one]);
    assert_eq!(good("tun: {dns-hijack: []}").tun.dns_hijack, []);
}

#[test]
fn nameservers_are_read_as_mihomo_writes_them() {
    let text = "dns:\n  nameserver: [9.9.9.9, '9.9.9.9:5353', 'tcp://dns.example', 'udp://[2620:fe::fe]:53', \
                '2620:fe::9', 'system', 'system://']\n";
    let servers = good(text).dns.nameserver;
    let written: Vec<String> = servers
        .iter()
        .map(|server| match server {
            Nameserver::Udp(address) => format!("udp {address}"),
            Nameserver::Tcp(address) => format!("tcp {address}"),
            Nameserver::System => "system".to_owned(),
        })
        .collect();
    let expected = [
        "udp 9.9.9.9:53",
        "udp 9.9.9.9:5353",
        "tcp dns.example:53",
        "udp [2620:fe::fe]:53",
        "udp [2620:fe::9]:53",
        "system",
        "system",
    ];
    assert_eq!(written, expected);
}

#[test]
fn nobody_takes_the_place_of_a_nameserver_that_cannot_be_used() {
    let text = "dns: {enable: true, nameserver: [dns.example], default-nameserver: ['tls://192.0.2.1']}\n";
    assert!(said(text).contains("dns.default-nameserver: nobody is left who could find"), "{}", said(text));
    assert!(good("dns: {enable: true, default-nameserver: ['tls://192.0.2.1']}\n").dns.default_nameserver.is_empty());
    for listen in ["'127.0.0.1:1053'", "'0.0.0.0:1053'", "':1053'"] {
        let text = said(&format!("dns: {{enable: true, listen: {listen}, nameserver: ['127.0.0.1:1053']}}\n"));
        assert!(text.contains("there we answer ourselves"), "{text}");
        good(&format!("dns: {{enable: true, listen: {listen}, nameserver: ['127.0.0.1:1054']}}\n"));
    }
}

#[test]
fn one_usable_nameserver_is_enough() {
    let text = "dns: {enable: true, nameserver: [https://dns.example/dns-query, 9.9.9.9]}\nrules: ['MATCH,DIRECT']";
    assert_eq!(good(text).dns.nameserver.len(), 1);
    assert_eq!(said(text).matches("warning").count(), 1, "{}", said(text));
}

#[test]
fn templates_anchors_and_merge_keys_work_without_a_word() {
    let text = "x-proxy: {a: 1}\np: &p {type: socks5, server: 192.0.2.1, port: 1080}\nproxies:\n  - {name: a, <<: *p}\n  \
                - <<: *p\n    name: b\n    port: 1081\nproxy-groups:\n  - {name: G, type: select, proxies: &all [a, b]}\n  \
                - {name: H, type: select, proxies: *all}\nrules:\n  - MATCH,G\n";
    assert_eq!(said(text), "");
    let profile = good(text);
    assert_eq!(profile.proxies[1].node.child("port").unwrap().text(), Some("1081"));
    assert_eq!(profile.proxies[0].node.child("server").unwrap().text(), Some("192.0.2.1"));
    assert_eq!(profile.groups[1].proxies, ["a", "b"]);
}

#[test]
fn a_group_may_be_called_global() {
    let text = "proxy-groups: [{name: GLOBAL, type: select, proxies: [DIRECT]}]\nmode: global\n";
    assert_eq!(good(text).groups[0].name, "GLOBAL");
    assert_eq!(said(text), "");
}

#[test]
fn rules_know_their_line_and_text() {
    let profile = good("rules:\n  - DOMAIN,a.example,REJECT\n\n  - MATCH,DIRECT\n");
    let lines: Vec<_> = profile.rules.iter().map(|placed| (placed.rule.line, &*placed.rule.text)).collect();
    assert_eq!(lines, [(2, "DOMAIN,a.example,REJECT"), (4, "MATCH,DIRECT")]);
}

#[test]
fn every_known_key_without_effect_gets_exactly_one_warning() {
    for key in known::TOP_LEVEL.iter().chain(known::SUBTREES.iter().map(|(key, _)| key)) {
        assert_eq!(said(&format!("{key}:\nmode: direct\n")).matches("has no effect yet").count(), 1, "{key}");
    }
    for (parent, keys) in [("tun", known::TUN), ("dns", known::DNS)] {
        for key in keys {
            let text = said(&format!("mode: direct\n{parent}:\n  {key}: 0\n"));
            assert_eq!(text.matches("has no effect yet").count(), 1, "{text}");
            assert!(text.starts_with(&format!("p.yaml:3:3: warning: {parent}.{key}: ")), "{text}");
        }
    }
    for (key, why) in known::TUN_WITH_REASON.iter().flat_map(|(keys, why)| keys.iter().map(move |key| (key, why))) {
        let text = said(&format!("mode: direct\ntun:\n  {key}: 0\n"));
        assert!(text.starts_with(&format!("p.yaml:3:3: warning: tun.{key}: `{key}` has no effect\n")), "{text}");
        assert!(text.contains(&format!("hint: {why}")), "{text}");
    }
}

#[test]
fn what_is_not_text_is_refused_where_it_stops_being_text() {
    let (profile, report) = read("p.yaml", b"mode: rule\nsecret: a\xff\n");
    assert!(profile.is_none());
    assert!(report.to_string().starts_with("p.yaml:2:10: error: the profile is not UTF-8"), "{report}");
}

#[test]
fn a_file_that_is_not_there_is_an_error_and_not_a_panic() {
    let (profile, report) = load(&root().join("profiles/no-such-profile.yaml"));
    assert!(profile.is_none() && report.has_errors());
    assert!(report.to_string().contains("no-such-profile.yaml: error: the profile cannot be read: No such file"));
}

#[test]
fn numbers_that_would_end_or_stop_the_clock_are_refused_and_zero_is_the_default() {
    let tun = |value: &str| said(&format!("tun: {{udp-timeout: {value}}}\nmode: direct\n"));
    assert_eq!(good("tun: {udp-timeout: 0}\nmode: direct\n").tun.udp_timeout.as_secs(), 300);
    assert_eq!(good("tun: {udp-timeout: 86400}\nmode: direct\n").tun.udp_timeout.as_secs(), 86_400);
    for value in ["86401", "18446744073709551615", "-1", "99999999999999999999999999999999999999999"] {
        let text = tun(value);
        assert!(text.starts_with("p.yaml:1:20: error: tun.udp-timeout: expected seconds from 0 to 86400"), "{text}");
    }
    let text = said("dns: {fake-ip-ttl: 4294967295}\nmode: direct\n");
    assert!(text.contains("dns.fake-ip-ttl: expected seconds from 0 to 86400"), "{text}");
}

#[test]
fn names_are_read_in_the_form_that_the_dns_knows() {
    let filter = |text: &str| good(&format!("dns: {{fake-ip-filter: [{text}]}}\nmode: direct\n")).dns.fake_ip_filter;
    assert_eq!(filter("'+.MÜNCHEN.example', '*.a.example'"), ["+.xn--mnchen-3ya.example", "*.a.example"]);
    assert_eq!(filter("'a*b.example', x.example"), ["x.example"]);
    let text = said("dns: {fake-ip-filter: ['a*b.example', 'GEOSITE:cn']}\nmode: direct\n");
    assert!(text.contains("matches no name") && text.contains("`geosite:` has no effect here yet"), "{text}");
}

#[test]
fn a_mistyped_address_is_no_name() {
    for wrong in ["256.1.1.1", "0x7f.1", "1.2.3", "8", "a.0xff", "*.example", "1.2.3.4:1080"] {
        let (_, report) = read("p.yaml", format!("dns: {{nameserver: ['{wrong}']}}\nmode: direct\n").as_bytes());
        // A nameserver may have a port.
        assert_eq!(report.has_errors(), !wrong.ends_with(":1080"), "{wrong}: {report}");
        assert!(super::decode::host(wrong).is_none(), "{wrong}");
    }
    for right in ["a1.example", "1e100.net", "192.0.2.1", "[2001:db8::1]", "localhost", "xn--p1ai"] {
        assert!(super::decode::host(right).is_some(), "{right}");
    }
    assert_eq!(super::decode::host("ｅｘａｍｐｌｅ.com").unwrap().to_string(), "example.com");
}

#[test]
fn misspelt_names_cost_little_and_the_first_ones_get_a_hint() {
    let proxies: String = (0..400).map(|n| format!("  - {{name: proxy number {n}, type: direct}}\n")).collect();
    let rules: String = (0..2000).map(|n| format!("  - DOMAIN,n{n}.example,proxy numbr {n}\n")).collect();
    let (_, report) = read("p.yaml", format!("proxies:\n{proxies}rules:\n{rules}").as_bytes());
    let hints = report.errors().filter(|error| error.hint.is_some()).count();
    assert!((1..100).contains(&hints), "{hints}");
    assert!(report.to_string().contains("did you mean `proxy number 0`?"));
}

#[test]
fn windows_line_ends_and_a_byte_order_mark_change_nothing() {
    let text = "\u{feff}mode: rule\r\nrules:\r\n  - MATCH,Nowhere\r\n";
    assert!(said(text).starts_with("p.yaml:3:11: error: rules[0]: there is no proxy or group named `Nowhere`"));
}

#[test]
fn passwords_stay_out_of_debug_output() {
    let profile = good("authentication: ['me:swordfish']\nmode: direct\n");
    assert_eq!(profile.listen.authentication[0].password, "swordfish");
    assert!(!format!("{:?}", profile.listen).contains("swordfish"));
}

/// docs/profile.md by section: the part of the heading between backticks (or nothing) and the text below it.
fn documented() -> Vec<(String, String)> {
    let text = fs::read_to_string(root().join("docs/profile.md")).unwrap();
    let sections = text.split("\n## ").skip(1).map(|section| {
        let (heading, body) = section.split_once('\n').unwrap();
        (heading.split('`').nth(1).unwrap_or_default().to_owned(), body.to_owned())
    });
    sections.collect()
}

fn section(name: &str) -> String {
    documented().into_iter().find(|(heading, _)| heading == name).unwrap().1
}

/// The first cells of the section's tables.
fn rows(section: &str) -> Vec<&str> {
    section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect()
}

#[test]
fn every_key_that_the_decoder_asks_for_is_documented_and_the_other_way_round() {
    let (_, report) = read("p.yaml", b"tun: {enable: false}\ndns: {enable: false}\nmode: direct\n");
    let mut asked: BTreeSet<String> = report.asked.clone();
    for (prefix, heading) in [("tun.", "tun"), ("dns.", "dns"), ("", "")] {
        let text = section(heading);
        let (mine, others) = asked.into_iter().partition(|key| key.starts_with(prefix));
        asked = others;
        let mine: BTreeSet<String> = mine;
        assert!(mine.len() > 15, "{mine:?}");
        for key in &mine {
            let key = key.strip_prefix(prefix).unwrap();
            assert!(text.contains(&format!("`{key}`")), "docs/profile.md does not know {prefix}{key}");
        }
        for row in rows(&text) {
            assert!(mine.contains(&format!("{prefix}{row}")), "docs/profile.md has {prefix}{row}, the decoder has not");
        }
    }
}

#[test]
fn a_key_in_the_wrong_section_is_told_where_it_belongs() {
    let hint = |text: &str| said(&format!("mode: direct\n{text}\n"));
    for (text, words) in [
        ("tun: { memory-limit: 64MB }", "`memory-limit` belongs at the top level"),
        ("kill-switch: true", "`kill-switch` belongs under `tun:`"),
        ("dns: { dns-hijack: [any:53] }", "`dns-hijack` belongs under `tun:`"),
        ("tun: { dns: { enable: true } }", "`dns` belongs at the top level"),
        ("tun: { nameserver: [192.0.2.1] }", "`nameserver` belongs under `dns:`"),
        ("enable: true", "`enable` belongs under `tun:`, or under `dns:`"),
        ("dns: { nameserver-policy2: 1, hosts: {} }", "`hosts` belongs at the top level"),
        ("tun: { store-selected: true }", "`store-selected` belongs under `profile:`"),
        ("sniffer: { auto-route: true }", "`auto-route` belongs under `tun:`"),
        ("tun: { memory-limt: 64MB }", "did you mean `memory-limit`? That belongs at the top level"),
    ] {
        assert!(hint(text).contains(&format!("hint: {words}")), "{words} in: {}", hint(text));
    }
    // What is misspelt where it belongs comes first.
    assert!(hint("tun: { auto-rout: true }").contains("did you mean `auto-route`?\n"));
}

#[test]
fn every_heeded_key_of_a_section_is_known_to_belong_there() {
    let (_, report) = read("p.yaml", b"tun: {enable: false}\ndns: {enable: false}\nmode: direct\n");
    let unheeded = |key: &str| match key.split_once('.') {
        Some(("tun", key)) => {
            known::TUN.contains(&key) || known::TUN_WITH_REASON.iter().any(|(keys, _)| keys.contains(&key))
        }
        Some(("dns", key)) => known::DNS.contains(&key),
        _ => known::TOP_LEVEL.contains(&key) || known::SUBTREES.iter().any(|(name, _)| *name == key),
    };
    let asked: BTreeSet<String> = report.asked.iter().filter(|key| !unheeded(key)).cloned().collect();
    let dot = |section: &str| if section.is_empty() { String::new() } else { format!("{section}.") };
    let listed = known::HEEDED.iter().flat_map(|(section, keys)| keys.iter().map(move |key| dot(section) + key));
    assert_eq!(listed.collect::<BTreeSet<String>>(), asked);
}

#[test]
fn a_kill_switch_that_leaves_this_host_open_is_warned_of() {
    let said = |more: &str| said(&format!("mode: direct\ntun: {{ enable: true, kill-switch: true{more} }}\n"));
    for more in [", include-interface: [lan0]", ", exclude-interface: [lo]"] {
        assert!(said(more).contains("tun.kill-switch: the kill switch leaves this host itself open"), "{more}");
    }
    assert!(!said("").contains("open") && !said(", include-interface: [lan0, lo]").contains("open"));
}

#[test]
fn keys_without_effect_are_documented_as_such() {
    for (heading, keys) in [("", known::TOP_LEVEL), ("tun", known::TUN), ("dns", known::DNS)] {
        let text = section(heading);
        let list = text.split("No effect yet: ").nth(1).unwrap().split("\n\n").next().unwrap();
        let listed: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
        assert_eq!(listed, keys, "{heading}");
    }
    let text = section("tun");
    let list = text.split("No effect: ").nth(1).unwrap().split("\n\n").next().unwrap();
    for key in known::TUN_WITH_REASON.iter().flat_map(|(keys, _)| *keys) {
        assert!(list.contains(&format!("`{key}`")), "{key}");
    }
    let text = section("");
    for (key, children) in known::SUBTREES {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{key}` |"))).unwrap();
        let listed: Vec<&str> = row.split('`').skip(3).step_by(2).collect();
        assert_eq!(&listed, children, "{key}");
    }
}

#[test]
fn every_rule_type_is_documented_with_its_own_words() {
    let text = section("rules");
    let expected: Vec<String> =
        TYPES.iter().map(|kind| format!("| `{}` | {} |", kind.name, kind.description)).collect();
    let written: Vec<&str> = text.lines().filter(|line| line.starts_with("| `")).collect();
    assert_eq!(written, expected);
    let list = text.split("not built yet: ").nth(1).unwrap().split("\nSuch").next().unwrap();
    assert_eq!(list.split('`').skip(1).step_by(2).collect::<Vec<_>>(), NOT_YET);
}

/// Lines that look like a profile, with all that may go wrong in them.
fn almost_a_profile() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        Just("mode"),
        Just("tun"),
        Just("dns"),
        Just("rules"),
        Just("proxies"),
        Just("proxy-groups"),
        Just("  name"),
        Just("  nameserver"),
        Just("  proxies"),
        Just("  - name"),
        Just("  dns-hijack"),
        Just("  <<"),
        Just("mixed-port"),
    ];
    let value =
        prop_oneof!["[a-zA-Z0-9:/.,*&#-]{0,20}", "\\[.{0,20}\\]", "&a [x, y]", "\\*a", "\\{.{0,20}\\}", ".{0,12}"];
    proptest::collection::vec((key, value), 0..12)
        .prop_map(|lines| lines.into_iter().map(|(key, value)| format!("{key}: {value}\n")).collect())
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let (profile, report) = read("p.yaml", &bytes);
        prop_assert!(profile.is_some() || report.has_errors());
        let _ = report.to_string();
    }

    #[test]
    fn nothing_that_resembles_a_profile_makes_it_panic(text in almost_a_profile()) {
        let (profile, report) = read("p.yaml", text.as_bytes());
        prop_assert!(profile.is_some() || report.has_errors());
        let _ = report.to_string();
    }
}

#[test]
fn a_slip_in_a_key_that_keeps_traffic_in_is_an_error_and_any_other_a_warning() {
    let report = |key: &str| read("p.yaml", format!("tun:\n  enable: true\n  {key}: true\n").as_bytes()).1;
    for (key, meant) in [
        ("kill_switch", "kill-switch"),
        ("Kill-Switch", "kill-switch"),
        ("killswitch", "kill-switch"),
        ("strict_route", "strict-route"),
        ("exclude-uids", "exclude-uid"),
        ("exclude_interface", "exclude-interface"),
        ("route-adress", "route-address"),
        ("route_exclude_address", "route-exclude-address"),
    ] {
        let report = report(key);
        let text = report.to_string();
        assert!(text.contains(&format!("p.yaml:3:3: error: tun.{key}: ")), "{key}: {text}");
        assert!(text.contains(&format!("did you mean `{meant}`?")), "{key}: {text}");
    }
    for key in ["auto_route", "mtuu", "something-else"] {
        assert!(!report(key).has_errors() && !report(key).is_empty(), "{key}: {}", report(key));
    }
    // The same words in their own places are what they are.
    assert!(report("strict-route").is_empty() && !report("include-package").has_errors());
}

#[test]
fn a_proxy_port_for_everybody_is_warned_of() {
    let told = |text: &str| read("p.yaml", text.as_bytes()).1.to_string().contains("open to whoever");
    assert!(told("mixed-port: 7890\nallow-lan: true\n"));
    for more in [
        "authentication: ['a:b']",
        "lan-allowed-ips: [192.168.1.0/24]",
        "lan-disallowed-ips: [203.0.113.0/24]",
        "bind-address: 192.168.1.1",
    ] {
        assert!(!told(&format!("mixed-port: 7890\nallow-lan: true\n{more}\n")), "{more}");
    }
    assert!(!told("allow-lan: true\n") && !told("mixed-port: 7890\n"));
}
