use super::*;
use crate::net::DialError;
use crate::outbound::fixture::{session, table};
use crate::session::Network;

const PROXIES: &str = "
proxies:
  - {name: b, type: socks5, server: 192.0.2.1, port: 1080, udp: true}
  - {name: a, type: http, server: proxy.test, port: 8080}
  - {name: future, type: vmess, server: proxy.test, port: 443, uuid: x, alterId: 0, cipher: auto}
";

fn built(groups: &str) -> Outbounds {
    let (table, report) = table(&format!("{PROXIES}proxy-groups:\n{groups}"));
    assert!(!report.has_errors(), "{report}");
    table
}

fn chain(table: &Outbounds, name: &str) -> String {
    table.outbound(table.index(name).unwrap()).chain().join(" > ")
}

/// The single error of a profile, as text.
fn error(yaml: &str) -> String {
    let (_, report) = table(yaml);
    let errors: Vec<String> = report.errors().map(|error| report.block(error).to_string()).collect();
    assert_eq!(errors.len(), 1, "{report}");
    errors[0].clone()
}

async fn refusal(table: &Outbounds, name: &str) -> String {
    let outbound = table.outbound(table.index(name).unwrap());
    assert_eq!(outbound.networks(), Networks::ALL, "what falls through could end on DIRECT");
    for network in [Network::Tcp, Network::Udp, Network::Icmp] {
        let session = session(network, "example.org", 443);
        let error = match network {
            Network::Tcp => outbound.connect(&session).await.err(),
            Network::Udp => outbound.associate(&session).await.err(),
            Network::Icmp => outbound.echo(false).err(),
        };
        assert!(matches!(error, Some(DialError::Unsupported(_))), "{error:?}");
    }
    outbound.connect(&session(Network::Tcp, "example.org", 443)).await.err().unwrap().to_string()
}

#[test]
fn the_built_in_outbounds_come_first_and_the_profile_keeps_its_order() {
    let table = built("  - {name: z, type: select, proxies: [y]}\n  - {name: y, type: select, proxies: [a]}");
    let names: Vec<&str> = table.names().collect();
    let expected = ["DIRECT", "REJECT", "REJECT-DROP", "PASS", "COMPATIBLE", "b", "a", "future", "z", "y", "GLOBAL"];
    assert_eq!(names, expected);
    for name in names {
        assert_eq!(table.outbound(table.index(name).unwrap()).name(), name);
    }
    for (name, index) in [
        ("DIRECT", Outbounds::DIRECT),
        ("REJECT", Outbounds::REJECT),
        ("REJECT-DROP", Outbounds::REJECT_DROP),
        ("PASS", Outbounds::PASS),
    ] {
        assert_eq!(table.index(name), Some(index));
    }
    assert_eq!(chain(&table, "z"), "z > y > a");
    assert_eq!(chain(&table, "GLOBAL"), "GLOBAL > DIRECT");
    table.select("GLOBAL", "z").unwrap();
    assert_eq!(chain(&table, "GLOBAL"), "GLOBAL > z > y > a");
}

#[test]
fn a_group_carries_what_its_present_member_carries() {
    let table = built(
        "  - {name: g, type: select, proxies: [b, a, PASS]}\n  \
           - {name: no-udp, type: select, proxies: [b], disable-udp: true}",
    );
    let group = table.index("g").unwrap();
    assert!(table.networks(group).udp);
    table.select("g", "a").unwrap();
    assert!(!table.networks(group).udp);
    assert!(!table.passes(group));
    table.select("g", "PASS").unwrap();
    assert!(table.passes(group));
    assert!(!table.networks(table.index("no-udp").unwrap()).udp);
    assert_eq!(table.select("g", "nobody").unwrap_err().to_string(), "group `g` has no member `nobody`");
    assert_eq!(table.select("a", "b").unwrap_err().to_string(), "there is no group `a`");
}

#[tokio::test]
async fn a_kind_that_is_not_built_refuses_and_never_goes_direct() {
    let (table, report) = table(&format!(
        "{PROXIES}proxy-groups:
  - {{name: only, type: url-test, proxies: [future]}}
  - {{name: outer, type: select, proxies: [only, future]}}
  - {{name: provided, type: select, use: [sub]}}
  - {{name: chained, type: relay, proxies: [a, b]}}
"
    ));
    assert!(!report.has_errors(), "{report}");
    assert!(report.to_string().contains("test.yaml:5:26: warning: proxies[2].type"), "{report}");
    assert!(refusal(&table, "future").await.contains("`vmess` is not built yet"));
    for group in ["only", "outer", "provided", "chained"] {
        assert!(refusal(&table, group).await.contains(group));
    }
}

#[tokio::test]
async fn a_detour_that_is_not_built_refuses_rather_than_go_straight() {
    let (table, report) =
        table("proxies: [{name: p, type: socks5, server: 192.0.2.1, port: 1080, dialer-proxy: other}]");
    assert!(!report.has_errors(), "{report}");
    assert!(refusal(&table, "p").await.contains("dialer-proxy"));
}

#[test]
fn groups_that_will_measure_take_the_first_usable_member_and_name_it() {
    let (table, report) = table(&format!(
        "{PROXIES}proxy-groups:
  - {{name: auto, type: url-test, proxies: [future, a, b], url: http://x.test, interval: 300}}
  - {{name: back, type: url-test, proxies: [future, b]}}
  - {{name: pick, type: select, proxies: [future, b]}}
  - {{name: all, type: load-balance, include-all: true}}
  - {{name: chosen, type: select, proxies: [a, b], default-selected: b}}
"
    ));
    assert!(!report.has_errors(), "{report}");
    assert_eq!(chain(&table, "auto"), "auto > a");
    assert_eq!(chain(&table, "back"), "back > b");
    assert_eq!(chain(&table, "pick"), "pick > future");
    assert_eq!(chain(&table, "all"), "all > a");
    assert_eq!(chain(&table, "chosen"), "chosen > b");
    let text = report.to_string();
    assert!(
        text.contains("`type: url-test` acts as `select` for now, on the first member that is built, `a`\n"),
        "{text}"
    );
    assert!(
        text.contains("`type: url-test` acts as `select` for now, on the first member that is built, `b`\n"),
        "{text}"
    );
}

#[test]
fn every_mistake_is_told_with_its_place() {
    for (yaml, told) in [
        ("proxies: [{name: p, type: sock5, server: a.test, port: 1}]", "test.yaml:1:27: error: proxies[0].type"),
        ("proxies: [{type: socks5, server: a.test, port: 1}]", "the key `name` is required"),
        ("proxies: [{name: p, type: socks5, server: a.test, port: 0}]", "a port from 1 to 65535"),
        ("proxies: [{name: p, type: socks5, server: a.test, port: 1, fingerprint: ab}]", "64 hexadecimal digits"),
        ("proxies: [{name: DIRECT, type: direct}]", "`DIRECT` is a built-in target"),
        ("proxies: [text]", "expected a mapping"),
        (
            "proxy-groups: [{name: g, type: select, proxies: [nobody]}]",
            "proxy-groups[0].proxies[0]: there is no proxy or group",
        ),
        ("proxy-groups: [{name: g, type: select}]", "the group `g` is empty"),
        ("proxy-groups: [{name: g, type: selct, proxies: [DIRECT]}]", "did you mean `select`?"),
        ("proxy-groups: [{name: g, proxies: [DIRECT]}]", "the key `type` is required"),
        ("proxy-groups: [{name: g, type: select, proxies: [g]}]", "contain each other: g -> g"),
        (
            "proxy-groups: [{name: a, type: select, proxies: [b]}, {name: b, type: select, proxies: [c, DIRECT]},
              {name: c, type: select, proxies: [DIRECT, b]}]",
            "contain each other: b -> c -> b",
        ),
    ] {
        let told_here = error(yaml);
        assert!(told_here.contains(told), "{told_here}");
    }
}

#[test]
fn a_flow_that_a_missing_proxy_sends_direct_is_announced() {
    for (groups, direct) in [
        ("{name: g, type: fallback, proxies: [future, DIRECT]}", true),
        ("{name: g, type: url-test, proxies: [future, plain]}", true),
        ("{name: g, type: fallback, proxies: [future, inner]}, {name: inner, type: select, proxies: [DIRECT]}", true),
        ("{name: g, type: fallback, proxies: [future, b, DIRECT]}", false),
    ] {
        let (table, report) = table(&format!("{PROXIES}  - {{name: plain, type: direct}}\nproxy-groups: [{groups}]\n"));
        let text = report.to_string();
        assert_eq!(text.contains("its flows go DIRECT"), direct, "{text}");
        assert_eq!(table.goes_direct(table.index("g").unwrap()), direct, "{text}");
    }
}

#[tokio::test]
async fn a_group_whose_members_cannot_be_told_refuses_rather_than_take_all() {
    for keys in
        ["include-all: true, filter: b", "proxies: [a, b], exclude-filter: a", "proxies: [a, b], exclude-type: http"]
    {
        let (table, report) = table(&format!("{PROXIES}proxy-groups: [{{name: g, type: select, {keys}}}]\n"));
        assert!(!report.has_errors(), "{report}");
        assert_eq!(report.to_string().matches("it refuses every flow").count(), 1, "{report}");
        assert!(refusal(&table, "g").await.contains("not built yet"));
    }
    let (table, report) =
        table(&format!("{PROXIES}proxy-groups: [{{name: g, type: select, proxies: [a], filter: b}}]\n"));
    assert!(report.to_string().contains("`filter` has no effect"), "{report}");
    assert_eq!(chain(&table, "g"), "g > a");
}

#[test]
fn include_all_brings_the_proxies_by_name_behind_those_that_are_named() {
    let table = built("  - {name: g, type: select, proxies: [future], include-all: true}");
    let group = table.group(table.index("g").unwrap()).unwrap();
    let names: Vec<&str> = group.members().iter().map(|member| member.outbound.name()).collect();
    assert_eq!(names, ["future", "a", "b"]);
}

#[test]
fn paths_are_those_of_the_file_when_an_earlier_entry_is_dropped() {
    let text = error("proxies: [{name: p, type: socks5, server: a.test, port: 1}, {name: q, type: sock5}]");
    assert!(text.contains("proxies[1].type"), "{text}");
    let (_, report) = table("proxies: [{type: socks5, server: a.test, port: 1}, {name: q, type: sock5}]");
    assert!(report.to_string().contains("proxies[1].type"), "{report}");
    assert_eq!(report.errors().count(), 2, "{report}");
}

#[test]
fn a_user_name_without_a_password_is_a_warning() {
    let (_, report) = table("proxies: [{name: p, type: socks5, server: a.test, port: 1, username: u}]");
    assert!(!report.has_errors() && report.to_string().contains("an empty one is sent"), "{report}");
    let (_, report) = table("proxies: [{name: p, type: socks5, server: a.test, port: 1, password: u}]");
    assert!(!report.has_errors() && report.to_string().contains("is not sent"), "{report}");
}

#[test]
fn names_that_are_not_ascii_can_be_on_a_certificate() {
    for keys in ["server: münchen.example, tls: true", "server: a.test, tls: true, sni: Bücher.example"] {
        let (_, report) = table(&format!("proxies: [{{name: p, type: http, port: 443, {keys}}}]"));
        assert!(report.is_empty(), "{report}");
    }
}

#[test]
fn unknown_keys_and_keys_without_effect_are_warnings() {
    let (_, report) = table("proxies: [{name: p, type: socks5, server: a.test, port: 1, usernam: u, tfo: true}]");
    assert!(!report.has_errors(), "{report}");
    let text = report.to_string();
    assert!(text.contains("did you mean `username`?") && text.contains("`tfo` has no effect yet"), "{text}");
}

#[test]
fn every_working_key_of_every_kind_is_in_the_documentation() {
    let docs = include_str!("../../../docs/profile.md");
    for kind in KINDS {
        assert!(docs.contains(&format!("## `{}`", kind.name)), "{}", kind.name);
        for key in kind.keys {
            assert!(docs.contains(&format!("`{key}`")), "{}: {key}", kind.name);
        }
    }
}
