//! The README's first command, as a newcomer runs it.

use std::env;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

/// How a system that allows no private namespaces ends the demo.
const REFUSED: &str = "does not let you make a private network namespace";

fn demo() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunproxy"));
    command.arg("demo");
    command
}

/// Runs it. None: namespaces are refused here, which is said aloud, and is a failure where `CI` is set.
fn run(test: &str, command: &mut Command) -> Option<Output> {
    let output = command.output().expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    if !said.contains(REFUSED) {
        return Some(output);
    }
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} cannot run here: {said}");
    // Written straight to the descriptor: the test harness would swallow what the print macros say of a passing test.
    let _ = writeln!(io::stderr(), "\n*** SKIPPED {test}: {said}\n");
    None
}

/// The table's lines, which begin with their verdict.
fn rows(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_row = |line: &&str| line.starts_with("ok  ") || line.starts_with("BAD ");
    text.lines().filter(is_row).map(str::to_owned).collect()
}

fn assert_all_well(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}\n{said}", output.status);
    assert!(said.is_empty(), "{said}");
    let rows = rows(output);
    assert!(rows.len() >= 12, "{text}");
    assert!(rows.iter().all(|row| row.starts_with("ok  ")), "{text}");
}

/// The row that begins with `asked` has each of `parts`.
fn assert_row(output: &Output, asked: &str, parts: &[&str]) {
    let rows = rows(output);
    let row = rows.iter().find(|row| row[4..].starts_with(asked)).unwrap_or_else(|| panic!("{asked}: {rows:?}"));
    for part in parts {
        assert!(row.contains(part), "{part}: {row}");
    }
}

/// The line of profiles/demo.yaml on which `rule` stands, as the table writes it.
fn placed(rule: &str) -> String {
    let line = include_str!("../profiles/demo.yaml").lines().position(|line| line == format!("  - {rule}"));
    let condition = rule.split(',').take(rule.matches(',').count().clamp(1, 2)).collect::<Vec<_>>().join(",");
    format!(" {}: {condition} ", line.expect("a rule of the demo's profile") + 1)
}

#[test]
fn the_demo_shows_every_way_a_flow_can_go() {
    let Some(output) = run("the demo", &mut demo()) else { return };
    assert_all_well(&output);
    let (shop, news) = ("DOMAIN-SUFFIX,shop.example,DIRECT", "DOMAIN-SUFFIX,news.example,abroad");
    assert_row(&output, "GET www.shop.example/ ", &["198.18.", &placed(shop), "straight"]);
    assert_row(&output, "GET www.shop.example/8MiB", &["198.18.", &placed(shop), "every byte right"]);
    // Without IPv6 on the system the demo leaves these out, and says so.
    if !String::from_utf8_lossy(&output.stdout).contains("IPv6 is switched off") {
        assert_row(&output, "the same through IPv6", &["fd00:5::", &placed(shop), "every byte right"]);
        assert_row(&output, "GET [2001:db8::10]/", &[" - ", "IP-CIDR6", "straight"]);
    }
    assert_row(&output, "GET www.news.example/", &[&placed(news), "from abroad"]);
    assert_row(&output, "GET wiki.office.example/", &["from the office"]);
    assert_row(&output, "GET films.example/", &["choice -> abroad", "from abroad"]);
    assert_row(&output, "GET ads.example/", &["REJECT", "refused"]);
    assert_row(&output, "GET tracker.example/", &["REJECT-DROP", "no answer"]);
    assert_row(&output, "closed port www.shop.example:81", &[&placed(shop), "refused"]);
    assert_row(&output, "UDP echo echo.news.example:7", &[&placed(news), "from abroad"]);
    assert_row(&output, "GET 198.51.100.7/", &[" - ", "from abroad"]);
    assert_row(&output, "GET blog.example/", &[&placed("MATCH,DIRECT")]);
}

#[test]
fn several_demos_run_at_once_without_meeting() {
    let running: Vec<_> = (0..4).map(|_| std::thread::spawn(|| run("four demos", &mut demo()))).collect();
    for output in running {
        if let Some(output) = output.join().expect("no panic") {
            assert_all_well(&output);
        }
    }
}

#[test]
fn an_ordinary_user_sees_the_same() {
    let folder;
    let mut command = demo();
    if nix::unistd::geteuid().is_root() {
        // A copy that nobody's way leads to: the build folder may be closed to others.
        folder = tempfile::Builder::new().permissions(open_to_all()).tempdir().expect("a folder");
        let copy = folder.path().join("tunproxy");
        std::fs::copy(env!("CARGO_BIN_EXE_tunproxy"), &copy).expect("a copy");
        command = Command::new(&copy);
        command.arg("demo").uid(65_534).gid(65_534);
    }
    let output = run("the demo as an ordinary user", &mut command);
    output.iter().for_each(assert_all_well);
}

fn open_to_all() -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o755)
}

#[test]
fn where_namespaces_are_refused_it_says_what_to_do() {
    // The limit of a user namespace of our own, which nobody else lives in.
    let mut command = Command::new("/bin/sh");
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" demo";
    command.args(["-c", script, env!("CARGO_BIN_EXE_tunproxy")]);
    let (user, group) = (nix::unistd::geteuid(), nix::unistd::getegid());
    let maps = [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {user} 1")),
        ("/proc/self/gid_map", format!("0 {group} 1")),
    ];
    // SAFETY: unshare(2), open(2) and write(2) are async-signal-safe; the texts were made before the fork.
    unsafe {
        command.pre_exec(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)?;
            maps.iter().try_for_each(|(file, text)| std::fs::write(file, text))
        });
    }
    let output = match command.output() {
        Ok(output) => output,
        Err(error) => {
            assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "no user namespace: {error}");
            let _ = writeln!(io::stderr(), "\n*** SKIPPED the refusal: no user namespace: {error}\n");
            return;
        }
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(REFUSED) && said.contains("sysctl user.max_user_namespaces"), "{said}");
    assert!(output.stdout.is_empty());
}
