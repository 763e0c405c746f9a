//! Programs of the distribution, with configurations made here. What they agree on with us is not our own reading twice.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use super::program::{PATIENCE, Program};
use super::{Netns, world};

/// A SOCKS5 server of the distribution, TCP and UDP, dante.
///
/// # Panics
/// If it does not come up.
pub(crate) fn danted(ns: &Netns, address: SocketAddr, outward: &str) -> Program {
    let ip = address.ip();
    let everybody = if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
    let config = format!(
        "logoutput: stdout\ninternal: {ip} port = {}\nexternal: {outward}\nsocksmethod: none\nclientmethod: none\n\
         user.privileged: root\nuser.unprivileged: root\n\
         client pass {{ from: {everybody} to: {everybody} }}\n\
         socks pass {{ from: {everybody} to: 0.0.0.0/0 command: bind connect udpassociate }}\n\
         socks pass {{ from: {everybody} to: 0.0.0.0/0 command: bindreply udpreply }}\n",
        address.port()
    );
    let file = configuration("danted.conf", &config);
    let mut command = ns.command("danted");
    command.arg("-f").arg(file);
    let danted = Program::start("danted", command);
    danted.wait_for(|line| line.contains("running")).unwrap_or_else(|said| panic!("{said}"));
    danted
}

/// A small SOCKS5 server for TCP, microsocks; with user and password if given.
///
/// # Panics
/// If it does not come up.
pub(crate) fn microsocks(ns: &Netns, address: SocketAddr, credentials: Option<(&str, &str)>) -> Program {
    let mut command = ns.command("microsocks");
    command.args(["-i", &address.ip().to_string(), "-p", &address.port().to_string()]);
    if let Some((user, password)) = credentials {
        command.args(["-u", user, "-P", password]);
    }
    // It says nothing when it is ready.
    until_listening(ns, Program::start("microsocks", command), address)
}

/// An HTTP proxy that knows CONNECT, tinyproxy; with user and password if given.
///
/// # Panics
/// If it does not come up.
pub(crate) fn tinyproxy(ns: &Netns, address: SocketAddr, credentials: Option<(&str, &str)>) -> Program {
    let login = credentials.map(|(user, password)| format!("BasicAuth {user} {password}\n")).unwrap_or_default();
    let config = format!(
        "Port {}\nListen {}\nTimeout 60\nLogLevel Connect\nMaxClients 100\n{login}",
        address.port(),
        address.ip()
    );
    let file = configuration("tinyproxy.conf", &config);
    let mut command = ns.command("tinyproxy");
    command.arg("-d").arg("-c").arg(file);
    until_listening(ns, Program::start("tinyproxy", command), address)
}

/// `iperf3 -s` that says when it listens.
///
/// # Panics
/// If it does not come up.
pub(crate) fn iperf3_server(ns: &Netns, address: IpAddr, port: u16) -> Program {
    let mut command = ns.command("iperf3");
    command.args(["-s", "--forceflush", "-B", &address.to_string(), "-p", &port.to_string()]);
    let server = Program::start("iperf3", command);
    server.wait_for(|line| line.contains("Server listening")).unwrap_or_else(|said| panic!("{said}"));
    server
}

/// A stub that asks `upstream`, in this order, for what it does not know, dnsmasq. By itself it knows `nas.home.test`.
/// Behind each may stand the interface or the address that it is asked from: `@eth0`.
///
/// # Panics
/// If it does not come up.
pub(crate) fn dnsmasq(ns: &Netns, address: SocketAddr, upstream: &[&str]) -> Program {
    let servers: String = upstream.iter().map(|server| format!("server={server}\n")).collect();
    let config = format!(
        "keep-in-foreground\nno-resolv\nno-hosts\npid-file=\nuser=root\nbind-interfaces\nstrict-order\nlog-facility=-\n\
         listen-address={}\nport={}\nhost-record=nas.home.test,203.0.113.10\n{servers}",
        address.ip(),
        address.port()
    );
    let mut command = ns.command("dnsmasq");
    command.arg("-C").arg(configuration("dnsmasq.conf", &config));
    until_listening(ns, Program::start("dnsmasq", command), address)
}

/// A stub that asks `upstream` for all, unbound, with further `words` of its section `server`.
///
/// # Panics
/// If it does not come up.
pub(crate) fn unbound(ns: &Netns, address: SocketAddr, upstream: &[&str], words: &str) -> Program {
    let servers: String = upstream.iter().map(|server| format!("  forward-addr: {server}\n")).collect();
    let config = format!(
        "server:\n  interface: {}\n  port: {}\n  username: \"\"\n  chroot: \"\"\n  pidfile: \"\"\n  use-syslog: no\n  \
         logfile: \"\"\n  module-config: iterator\n  local-zone: \"test.\" nodefault\n{words}remote-control:\n  control-enable: no\nforward-zone:\n  name: .\n\
         {servers}",
        address.ip(),
        address.port()
    );
    let mut command = ns.command("unbound");
    command.arg("-d").arg("-c").arg(configuration("unbound.conf", &config));
    until_listening(ns, Program::start("unbound", command), address)
}

fn configuration(name: &str, content: &str) -> PathBuf {
    let file = world::fresh_dir(name).join(name);
    fs::write(&file, content).expect("a file on the lab's desk");
    file
}

/// For programs that do not say when they are ready: connecting is the only event there is.
fn until_listening(ns: &Netns, program: Program, address: SocketAddr) -> Program {
    let listening = ns.enter(move || {
        world::poll_until(PATIENCE, || TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok())
    });
    assert!(listening.is_some(), "nothing listens at {address}:\n{}", program.output());
    program
}
