//! What the program says of itself, and how its log can be read by programs.

use std::fs;

use serde_json::Value;

use super::support::sites::{NAME, V4};
use super::support::tunproxy::{Place, Said, binary};
use super::support::{Netns, Sites, Topology, run};

fn said(args: &[&str]) -> Said {
    let ns = Netns::new("alone");
    Said::of(ns.command(binary()).args(args))
}

#[test]
fn help_names_every_command_and_shows_what_to_type() {
    run(&[], || {
        let help = said(&["--help"]);
        assert!(help.succeeded(), "{help:?}");
        for word in
            ["check", "plan", "doctor", "exec", "demo", "cleanup", "status", "stop", "completions", "man", "--format"]
        {
            assert!(help.stdout.contains(word), "{word} is missing in: {}", help.stdout);
        }
        assert!(help.stdout.contains("sudo tunproxy --profile"), "an example to copy: {}", help.stdout);
        assert!(!help.stdout.contains("inside"), "nobody is to call that: {}", help.stdout);
        for command in ["check", "plan", "doctor", "exec"] {
            let help = said(&[command, "--help"]);
            assert!(help.stdout.contains(&format!("tunproxy {command} --profile")), "an example: {}", help.stdout);
        }
        assert_eq!(said(&["--no-such-option"]).code, Some(2));
        let nothing = said(&[]);
        assert_eq!(nothing.code, Some(1));
        assert!(nothing.stderr.contains("--profile FILE"), "{nothing:?}");
    });
}

#[test]
fn completions_and_the_manual_page_come_from_the_same_source() {
    run(&[], || {
        for shell in ["bash", "zsh", "fish"] {
            let script = said(&["completions", shell]);
            assert!(script.succeeded() && script.stdout.contains("cleanup"), "{shell}: {script:?}");
            for internal in ["demo-client", "inside"] {
                assert!(!script.stdout.contains(internal), "{shell}: {internal} is for nobody to call");
            }
        }
        let page = said(&["man"]);
        assert!(page.succeeded() && page.stdout.starts_with(".") && page.stdout.contains("cleanup"), "{page:?}");
        let dir = super::support::world::fresh_dir("man");
        assert!(said(&["man", "--dir", &dir.to_string_lossy()]).succeeded());
        for reference in page.stdout.split_whitespace().filter(|word| word.ends_with("(1)")) {
            let name = reference.replace("\\-", "-").replace("(1)", ".1");
            assert!(dir.join(&name).is_file(), "the page refers to {name}");
        }
        for command in ["check", "plan", "doctor", "exec", "cleanup"] {
            let page = fs::read_to_string(dir.join(format!("tunproxy-{command}.1"))).unwrap();
            assert!(page.starts_with('.'), "{page}");
        }
        // A reader that has gone, like `| head -1`, is no failure of ours.
        let ns = Netns::new("pipe");
        let script = "\"$0\" man | head -1; \"$0\" completions bash | head -1; \"$0\" --help | head -1";
        let cut = Said::of(ns.command("sh").args(["-c", script]).arg(binary()));
        assert!(cut.succeeded() && !cut.stderr.contains("panicked") && !cut.stderr.contains("rror"), "{cut:?}");
    });
}

#[test]
fn findings_are_json_by_either_of_two_options_and_the_narrower_wins() {
    run(&[], || {
        let ns = Netns::new("alone");
        let place = Place::new(PROFILE);
        let json = place.look(&ns, "check", &["--format", "json"]);
        assert!(json.stdout.starts_with('{') && json.stdout.contains("mixed-prot"), "{json:?}");
        assert_eq!(place.look(&ns, "check", &["--log-format", "json"]).stdout, json.stdout);
        let text = place.look(&ns, "check", &["--log-format", "json", "--format", "text"]);
        assert!(text.stdout.ends_with("the profile can be run\n"), "{text:?}");
    });
}

const PROFILE: &str = "
mode: rule
ipv6: true
log-level: info
mixed-prot: 1
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['DOMAIN,www.example.test,DIRECT', 'DST-PORT,81,REJECT', 'MATCH,DIRECT']
";

#[test]
fn the_log_is_json_line_by_line_and_a_flow_has_its_facts() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let script = format!("curl -4sS http://{NAME}/json; curl -s http://{V4}:81/; curl -s http://{V4}:82/; true");
        let options = ["--log-format", "json"];
        let said = Place::new(PROFILE).exec_with(&lab.host, &options, "sh", &["-c", &script]);
        let lines: Vec<Value> = said
            .stderr
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        let flows: Vec<&Value> = lines.iter().filter(|line| line["target"] == "flow").collect();
        let [carried, rejected, refused] = flows[..] else { panic!("{said:?}") };
        assert_eq!(carried["network"], "tcp");
        assert_eq!(carried["destination"], format!("{NAME}:80"));
        assert!(carried["fake"].as_str().is_some_and(|fake| fake.starts_with("198.18.")), "{carried}");
        assert!(carried["rule"].as_str().is_some_and(|rule| rule.contains("DOMAIN,www.example.test")), "{carried}");
        assert_eq!(carried["outbound"], "DIRECT");
        assert!(carried["up"].as_u64() > Some(20) && carried["down"].as_u64() > Some(20), "{carried}");
        assert!(carried["ms"].is_u64(), "{carried}");
        assert_eq!((&carried["outcome"], &carried["reason"]), (&"closed".into(), &"finished".into()));
        assert_eq!((&rejected["outbound"], &rejected["outcome"]), (&"REJECT".into(), &"rejected".into()));
        assert_eq!((&refused["outbound"], &refused["outcome"]), (&"DIRECT".into(), &"failed".into()));
        assert!(refused["reason"].as_str().is_some_and(|reason| reason.contains("refused")), "{refused}");
    });
}

#[test]
fn the_log_level_of_the_command_line_wins() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(&PROFILE.replace("mixed-prot: 1", ""));
        let url = format!("http://{V4}/");
        let silent = place.exec_with(&lab.host, &["--log-level", "warning"], "curl", &["-sS", &url]);
        assert!(silent.succeeded() && silent.stderr.is_empty(), "{silent:?}");
        let loud = place.exec_with(&lab.host, &["--log-level", "info"], "curl", &["-sS", &url]);
        assert!(loud.stderr.contains("outbound=\"DIRECT\""), "{loud:?}");
        fs::write(&place.profile, fs::read_to_string(&place.profile).unwrap().replace("info", "silent")).unwrap();
        let silent = place.exec(&lab.host, "curl", &["-sS", &url]);
        assert!(silent.succeeded() && silent.stderr.is_empty(), "{silent:?}");
    });
}
