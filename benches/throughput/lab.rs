//! The namespaces (client, host under test, internet), the servers, and the program under test with the proof that traffic went through it.

use std::cell::RefCell;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use tunproxy::app::{Command as Question, ask};

use super::process::Process;
use super::support::program::Program;
use super::support::topology::GATEWAY_V4;
use super::support::tunproxy::{Place, Tunproxy};
use super::support::{Netns, Topology, third_party};

/// Where the servers are.
pub(crate) const SERVER_V4: &str = "203.0.113.20";
/// The same for IPv6.
pub(crate) const SERVER_V6: &str = "2001:db8:1::20";
/// iperf3 serves one client at a time: one port for each that runs at once.
pub(crate) const IPERF_PORTS: [u16; 2] = [5201, 5202];

const CONGESTION: &str = "net.ipv4.tcp_congestion_control";

/// Everything goes out directly, by the shortest profile there is; the log is as short.
const PROFILE: &str = "
mode: rule
ipv6: true
log-level: warning
tun: { enable: true, auto-route: true, auto-forward: true, dns-hijack: ['any:53'] }
dns: { enable: true, enhanced-mode: fake-ip, nameserver: [192.168.1.1] }
rules: ['MATCH,DIRECT']
";

/// Host, LAN client, gateway and an internet with its servers.
pub(crate) struct Lab {
    pub(crate) topology: Topology,
    /// Milliseconds from each start of the program to its line `ready`.
    pub(crate) starts: RefCell<Vec<f64>>,
    place: Place,
    _servers: Vec<Program>,
}

/// The program under test at work in the host's namespace.
pub(crate) struct Running {
    tunproxy: Tunproxy,
    state: PathBuf,
    pub(crate) process: Process,
}

/// The plain relay at work in the host's namespace; ends when dropped.
pub(crate) struct Relaying {
    _program: Program,
    pub(crate) process: Process,
}

/// What the program has carried since its start, as it says itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Carried {
    pub(crate) flows: u64,
    pub(crate) failed: u64,
    pub(crate) up: u64,
    pub(crate) down: u64,
}

impl Lab {
    /// Builds it, with this congestion control or that of the machine.
    pub(crate) fn open(congestion: Option<&str>) -> Self {
        let topology = Topology::adjacent().and_lan();
        for ns in [&topology.internet, &topology.host, topology.client()] {
            ns.sysctl("net.ipv4.ip_local_port_range", "1024 65535");
            ns.sysctl("net.ipv4.tcp_tw_reuse", "1");
            if let Some(name) = congestion {
                ns.sysctl(CONGESTION, name);
            }
        }
        let mut servers = vec![ourselves("peer", &topology.internet, "--serve", SERVER_V4)];
        for address in [SERVER_V4, SERVER_V6] {
            let address: IpAddr = address.parse().expect("an address");
            servers.extend(IPERF_PORTS.map(|port| third_party::iperf3_server(&topology.internet, address, port)));
        }
        Self { topology, starts: RefCell::default(), place: Place::new(PROFILE), _servers: servers }
    }

    /// Starts the program on the host.
    pub(crate) fn start(&self) -> Running {
        let before = Instant::now();
        let tunproxy = self.place.start(&self.topology.host);
        self.starts.borrow_mut().push(before.elapsed().as_secs_f64() * 1e3);
        let state = self.place.state.clone();
        let status = ask(&state, Question::Status).expect("a running program answers");
        let process = Process(status["pid"].as_u64().expect("its process id"));
        Running { tunproxy, state, process }
    }

    /// `date` behind `exec`, not yet started; its arguments are still to come.
    pub(crate) fn exec(&self) -> Command {
        let mut command = self.place.exec_command(&self.topology.host, &[]);
        command.arg("date");
        command
    }

    /// Starts the plain relay on the host.
    pub(crate) fn start_relay(&self, server: &str) -> Relaying {
        let program = ourselves("relay", &self.topology.host, "--relay", server);
        let process = Process(program.pid().as_raw().unsigned_abs().into());
        Relaying { _program: program, process }
    }

    /// The congestion control in use.
    pub(crate) fn congestion(&self) -> String {
        let path = format!("/proc/sys/{}", CONGESTION.replace('.', "/"));
        let name = self.topology.host.enter(move || std::fs::read_to_string(path));
        name.expect("the kernel says").trim().to_owned()
    }

    /// The resolver that the host is configured with; no query gets there while the program runs.
    pub(crate) fn resolver() -> String {
        format!("{GATEWAY_V4}:53")
    }
}

impl Running {
    /// What it has carried so far.
    pub(crate) fn carried(&self) -> Carried {
        let status = ask(&self.state, Question::Status).expect("a running program answers");
        let count = |name: &str| status["flows"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {status}"));
        Carried { flows: count("opened"), failed: count("failed"), up: count("up"), down: count("down") }
    }

    /// Holds that `before` and now it carried at least these flows and bytes: no measurement of what passed it by.
    pub(crate) fn assert_carried(&self, before: Carried, flows: u64, up: u64, down: u64) {
        let now = self.carried();
        let carried = Carried {
            flows: now.flows - before.flows,
            failed: now.failed - before.failed,
            up: now.up - before.up,
            down: now.down - before.down,
        };
        let all = carried.flows >= flows && carried.up >= up && carried.down >= down;
        assert!(all, "{flows} flows, {up} bytes up and {down} down were moved, but not through us: {carried:?}");
    }

    /// Stops it; the host is as before.
    pub(crate) fn stop(self) {
        assert!(self.tunproxy.stop().success(), "it stops in order");
    }
}

/// This program once more, in another role.
fn ourselves(name: &str, ns: &Netns, role: &str, address: &str) -> Program {
    let mut command = ns.command(std::env::current_exe().expect("our own path"));
    command.args([role, address]);
    let program = Program::start(name, command);
    program.wait_for(|line| line.contains("serving")).unwrap_or_else(|said| panic!("{said}"));
    program
}
