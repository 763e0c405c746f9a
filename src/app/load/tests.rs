use std::fs;
use std::path::PathBuf;

use super::*;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn yaml_files(folder: &str) -> Vec<PathBuf> {
    let files = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")).collect();
    files.sort();
    assert!(!files.is_empty(), "no profiles in {folder}");
    files
}

fn report(text: &str) -> Report {
    read("p.yaml", text.as_bytes()).report
}

/// Each profile in tests/fixtures/bad has its messages beside it, all of them, so that one mistake is one message.
/// `BLESS=1` writes them anew, to be read in the diff.
#[test]
fn every_kind_of_bad_input_gets_its_message_and_no_other() {
    for path in yaml_files("tests/fixtures/bad") {
        let name = path.file_name().unwrap().to_str().unwrap();
        let report = read(name, &fs::read(&path).unwrap()).report;
        let expected = path.with_extension("txt");
        if std::env::var_os("BLESS").is_some() {
            fs::write(&expected, report.to_string()).unwrap();
        }
        assert_eq!(report.to_string(), fs::read_to_string(&expected).unwrap_or_default(), "{name}");
        assert!(!report.is_empty(), "{name}");
        for diagnostic in report.diagnostics() {
            assert!(diagnostic.place.at.line > 0 && diagnostic.place.at.column > 0, "{name}: {diagnostic:?}");
        }
    }
}

#[test]
fn the_profiles_that_we_ship_can_be_run_and_leave_nothing_to_say() {
    for path in yaml_files("profiles") {
        let checked = check(&path);
        assert!(checked.report.is_empty(), "{}", checked.report);
        assert!(checked.profile.unwrap().tun.enable, "{}", path.display());
    }
}

#[test]
fn a_prefix_that_names_one_address_and_means_all_is_told() {
    let said = |rule: &str| report(&format!("rules: ['{rule}', 'MATCH,DIRECT']\n")).to_string();
    for (rule, whole, alone) in [
        ("IP-CIDR,10.0.0.5/8,DIRECT", "10.0.0.0/8", "10.0.0.5/32"),
        ("IP-CIDR6,2001:db8::1/64,REJECT,no-resolve", "2001:db8::/64", "2001:db8::1/128"),
        ("SRC-IP-CIDR,192.168.1.10/24,DIRECT", "192.168.1.0/24", "192.168.1.10/32"),
    ] {
        let said = said(rule);
        let payload = rule.split(',').nth(1).unwrap();
        assert!(said.contains(&format!("`{payload}` stands for all of {whole}")), "{said}");
        assert!(said.contains(&format!("write {whole} if that is meant, or {alone} for this one address")), "{said}");
        assert!(said.starts_with(&format!("p.yaml:1:{}: warning", 10 + rule.find(payload).unwrap())), "{said}");
    }
    for fine in ["IP-CIDR,10.0.0.0/8,DIRECT", "IP-CIDR,10.0.0.5/32,DIRECT", "IP-CIDR,0.0.0.0/0,DIRECT"] {
        assert!(!said(fine).contains("stands for all of"), "{fine}");
    }
}

#[test]
fn rules_without_a_rule_are_told_where_the_key_stands() {
    for (text, at) in [
        ("mode: rule\nrules:\n", "p.yaml:2:1: "),
        ("mode: rule\nrules:\n  # - MATCH,DIRECT\ntun: {enable: true}\n", "p.yaml:2:1: "),
        ("mode: rule\nrules: []\n", "p.yaml:2:1: "),
        ("mode: rule\n", "p.yaml:1:1: "),
    ] {
        let said = report(text).to_string();
        assert!(said.starts_with(at) && said.contains("there are no `rules`"), "{text}: {said}");
    }
}

#[test]
fn a_profile_that_opens_nothing_is_for_exec_alone_and_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("p.yaml");
    for (text, opens) in [
        ("mode: direct", false),
        ("mode: direct\nmixed-port: 7890", true),
        ("mode: direct\ntun: {enable: true}", true),
        ("mode: direct\ndns: {enable: true, listen: '127.0.0.1:1053'}", true),
        ("mode: direct\ndns: {enable: false, listen: '127.0.0.1:1053'}", false),
    ] {
        fs::write(&path, text).unwrap();
        let report = check(&path).report;
        assert!(!report.has_errors(), "{report}");
        assert_eq!(!report.to_string().contains("opens nothing"), opens, "{text}: {report}");
    }
}

const H: &str = "proxies:
  - {name: h, type: http, server: 192.0.2.1, port: 80}
  - {name: plain, type: direct}
  - {name: s, type: socks5, server: 192.0.2.1, port: 80, udp: true}
proxy-groups:
  - {name: Final, type: select, proxies: [DIRECT, h]}
  - {name: away, type: select, proxies: [s, DIRECT]}
  - {name: next, type: select, proxies: [PASS]}
";

fn warnings(rules: &[&str]) -> Vec<String> {
    let rules: String = rules.iter().map(|rule| format!("  - {rule}\n")).collect();
    let report = report(&format!("{H}rules:\n{rules}"));
    assert!(!report.has_errors(), "{report}");
    report.warnings().map(|warning| warning.message.clone()).collect()
}

#[test]
fn udp_that_ends_on_direct_only_because_a_proxy_carries_none_is_told() {
    for (end, line) in [("MATCH,DIRECT", 11), ("MATCH,Final", 11), ("MATCH,plain", 11), ("MATCH,COMPATIBLE", 11)] {
        let said = warnings(&["DOMAIN,a.example,h", end]);
        assert_eq!(
            said,
            [format!("`h` carries no UDP, so UDP flows of this rule end on DIRECT, by line {line}")],
            "{end}"
        );
    }
    assert!(
        warnings(&["MATCH,h"])[0].contains("UDP flows that come to this rule end on DIRECT, because no rule below")
    );
    for fine in [
        &["DOMAIN,a.example,h", "MATCH,away"][..],
        &["DOMAIN,a.example,h", "DOMAIN,a.example,REJECT", "MATCH,DIRECT"],
        &["DOMAIN,a.example,h", "NETWORK,udp,REJECT", "MATCH,DIRECT"],
        &["MATCH,h", "NETWORK,udp,REJECT"],
        &["NETWORK,tcp,h", "MATCH,DIRECT"],
    ] {
        assert_eq!(warnings(fine), [""; 0], "{fine:?}");
    }
}

#[test]
fn pass_takes_nothing_and_what_follows_match_may_be_reached() {
    let open = "no rule takes everything: what none of them takes goes DIRECT";
    assert_eq!(warnings(&["DOMAIN,a.example,REJECT", "MATCH,PASS"]), [open]);
    assert_eq!(warnings(&["MATCH,next"]), [open]);
    let ping = "echo requests (ping) that no rule takes go DIRECT";
    assert_eq!(warnings(&["NETWORK,tcp,s", "NETWORK,udp,s"]), [ping]);
    assert_eq!(warnings(&["NETWORK,tcp,s", "NETWORK,udp,s", "NETWORK,icmp,REJECT"]), [""; 0]);
    let unreachable = "no flow reaches this rule or those below: line 10 takes everything";
    assert_eq!(warnings(&["MATCH,s", "DOMAIN,a.example,REJECT"]), [unreachable]);
    assert_eq!(warnings(&["MATCH,PASS", "MATCH,s"]), [""; 0]);
}

#[test]
fn what_rules_do_is_no_matter_where_no_rule_is_asked() {
    for mode in ["global", "direct"] {
        assert_eq!(report(&format!("mode: {mode}\n{H}rules: ['DOMAIN,a.example,h']\n")).to_string(), "");
    }
}

#[test]
fn thousands_of_rules_with_one_flaw_are_one_message() {
    let rules: String = (0..5000).map(|n| format!("  - DOMAIN,n{n}.example,h\n")).collect();
    let report = report(&format!("{H}rules:\n{rules}  - MATCH,DIRECT\n"));
    assert_eq!((report.warnings().count(), report.left_out()), (1, 0));
    assert!(report.to_string().contains("and 4991 more"), "{report}");
}

#[test]
fn groups_that_only_providers_fill_load_and_refuse() {
    for keys in ["use: [sub]", "include-all: true", "include-all-providers: true", "use: [sub], filter: hk"] {
        let text = format!("proxy-groups: [{{name: g, type: select, {keys}}}]\nmode: direct\n");
        let report = report(&text);
        assert!(!report.has_errors(), "{keys}: {report}");
        assert_eq!(report.warnings().count(), 1, "{keys}: {report}");
        assert!(report.to_string().contains("refuses every flow"), "{report}");
    }
    let report = report("proxy-groups: [{name: g, type: select, include-all: false}]\nmode: direct\n");
    assert!(report.to_string().contains("the group `g` is empty"), "{report}");
}

#[test]
fn a_chain_of_groups_without_end_is_one_error() {
    let group = |n: usize| {
        let member = if n == 0 { "DIRECT".to_owned() } else { format!("g{}", n - 1) };
        format!("  - {{name: g{n}, type: select, proxies: [{member}]}}\n")
    };
    for (count, errors) in [(64, 0), (65, 1), (10_000, 1)] {
        let chain: String = (0..count).rev().map(group).collect();
        let report = report(&format!("mode: direct\nproxy-groups:\n{chain}"));
        assert_eq!(report.errors().count(), errors, "{count}");
        assert!(errors == 0 || report.to_string().contains("more than 64 levels deep"), "{report}");
    }
}

#[test]
fn what_could_be_read_without_end_is_no_profile() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for (path, found) in [("/dev/zero".into(), "a device"), (fifo, "a FIFO"), (folder.path().to_owned(), "a directory")]
    {
        let text = load(&path).report.to_string();
        assert!(text.contains(&format!("cannot be read: it is {found}")), "{text}");
    }
}

#[test]
fn the_pipe_of_a_shell_is_a_profile() {
    use std::io::Write;
    use std::os::fd::AsRawFd;
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"mode: direct\nmixed-port: 7890\n").unwrap();
    drop(writer);
    let loaded = load(Path::new(&format!("/dev/fd/{}", reader.as_raw_fd())));
    assert!(loaded.report.is_empty() && loaded.profile.is_some(), "{}", loaded.report);
}

#[test]
fn no_udp_arrives_behind_a_rule_that_takes_all_of_it() {
    let told = |rules: &str| {
        let text = format!("proxies: [{{name: h, type: http, server: 192.0.2.1, port: 1}}]\nrules: [{rules}]\n");
        report(&text).to_string()
    };
    assert!(told("'MATCH,h'").contains("carries no UDP"));
    assert!(!told("'NETWORK,udp,REJECT', 'MATCH,h'").contains("carries no UDP"));
    // One that is itself passed over takes none.
    assert!(told("'NETWORK,udp,h', 'MATCH,h'").contains("carries no UDP"));
    assert!(told("'DST-PORT,443,REJECT', 'MATCH,h'").contains("carries no UDP"));
}

#[test]
fn a_profile_without_rules_is_told_that_they_are_missing() {
    assert!(report("tun: {enable: true}\n").to_string().contains("there are no `rules`"));
}
