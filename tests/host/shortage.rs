//! Where a start does not get what it takes: it says what is short and what to do, and leaves nothing behind.

use super::support::sites::NAME;
use super::support::tunproxy::{Place, Said};
use super::support::{Dump, Netns, Sites, Topology, run};

const TUN: &str = "/dev/net/tun";

fn profile() -> Place {
    Place::new(
        "mode: rule\nipv6: true\nlog-level: info\ntun: { enable: true, kill-switch: true }\n\
         dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,REJECT']\n",
    )
}

/// What a command of ours says that may have so many files open.
fn with_descriptors(many: u32, ns: &Netns, place: &Place, word: &str) -> Said {
    let mut command = ns.command("sh");
    let script = format!("exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; ulimit -n {many}; exec \"$@\"");
    command.args(["-c", &script, "sh"]).arg(super::support::tunproxy::binary());
    command.args(word.split_whitespace()).arg("--profile").arg(&place.profile);
    Said::of(command.arg("--state-dir").arg(&place.state))
}

#[test]
fn a_start_with_too_few_descriptors_says_so_with_what_to_do_and_changes_nothing() {
    run(&[TUN], || {
        let lab = Topology::desktop();
        let before = Dump::take(&lab.host);
        let place = profile();
        for many in [8, 12, 16, 18, 24, 30, 40] {
            let said = with_descriptors(many, &lab.host, &place, "");
            assert_eq!(said.code, Some(1), "{many}: {said:?}");
            assert!(said.stderr.contains(&format!("no more than {many} files open")), "{said:?}");
            assert!(said.stderr.contains("LimitNOFILE=") && said.stderr.contains("ulimit -n"), "{said:?}");
            assert!(!said.stderr.contains("No such device") && !said.stdout.contains("ready"), "{said:?}");
            before.assert_same(&Dump::take(&lab.host));
        }
        // Whoever asks before hears the same.
        for word in ["plan", "doctor"] {
            let said = with_descriptors(40, &lab.host, &place, word);
            assert_eq!(said.code, Some(1), "{word}: {said:?}");
            assert!(said.stdout.contains("no more than 40 files open"), "{word}: {said:?}");
        }
        let none = place.look(&lab.host, "plan", &[]);
        assert!(!none.stdout.contains("files open"), "{none:?}");
    });
}

#[test]
fn exec_with_just_enough_descriptors_carries_what_its_command_asks_for() {
    run(&["curl"], || {
        let lab = Topology::desktop();
        let _sites = Sites::open(&lab);
        let place = Place::new(
            "dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }\nrules: ['MATCH,DIRECT']\n",
        );
        // As many as are open, with that by which they are counted, and the least.
        let fetch = format!("for one in 1 2 3 4; do curl -sS --max-time 20 http://{NAME}/ >&2 && echo carried; done");
        for least in [24, 23] {
            let mut command = lab.host.command("sh");
            let script = format!(
                "exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; ulimit -n $(($(ls /proc/self/fd | wc -l) + {least})); exec \"$@\""
            );
            command.args(["-c", &script, "sh"]).arg(super::support::tunproxy::binary());
            command.args(["exec", "--profile"]).arg(&place.profile).args(["--", "sh", "-c", &fetch]);
            let said = Said::of(&mut command);
            let carried = said.stdout.matches("carried").count();
            assert_eq!((said.succeeded(), carried), if least == 24 { (true, 4) } else { (false, 0) }, "{said:?}");
        }
    });
}

#[test]
fn exec_with_too_few_descriptors_says_so_and_does_not_run_its_command() {
    run(&[], || {
        let ns = Netns::new("alone");
        let place = profile();
        for many in [10, 12, 16, 20] {
            let mut command = ns.command("sh");
            let script = format!("exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; ulimit -n {many}; exec \"$@\"");
            command.args(["-c", &script, "sh"]).arg(super::support::tunproxy::binary());
            command.args(["exec", "--profile"]).arg(&place.profile).args(["--", "echo", "it runs"]);
            let said = Said::of(&mut command);
            assert_eq!(said.code, Some(1), "{many}: {said:?}");
            assert!(said.stderr.contains(&format!("no more than {many} files open")), "{said:?}");
            assert!(!said.stdout.contains("it runs") && !said.stderr.contains("panicked"), "{said:?}");
        }
    });
}
