//! A host under test: two uplinks, a LAN, foreign rules where ours would like to be, and dumps of all its state.
//!
//! ```text
//! net (the internet, 203.0.113.9, 2001:db8:9::9) -- eth0 192.0.2.2/24, eth1 198.51.100.2/24 -- host -- lan0 192.168.7.1/24 -- lan
//! ```

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use tunproxy::platform::{HostOptions, HostPlan, Survey, Wishes};

use crate::sandbox::sh;
use crate::support::world::own_etc;

pub(crate) const TUN: &str = "tun7";
/// What a test needs that makes that device.
pub(crate) const NODE: &str = "/dev/net/tun";

/// Builds the topology in the sandbox, with `resolv_conf` as the host's resolver settings.
pub(crate) fn build(resolv_conf: &str) {
    own_etc(resolv_conf);
    sh("ip link set lo up
        for ns in net lan; do ip netns add $ns; ip -n $ns link set lo up; done
        ip link add eth0 type veth peer name eth0 netns net
        ip link add eth1 type veth peer name eth1 netns net
        ip link add lan0 type veth peer name lan0 netns lan
        for dev in eth0 eth1 lan0; do ip link set $dev addrgenmode none; done
        for dev in eth0 eth1; do ip -n net link set $dev addrgenmode none; done
        ip -n lan link set lan0 addrgenmode none
        # Neighbour discovery wants link-local addresses; given by hand they are there at once and the same every time.
        for dev in eth0 eth1; do
          ip link set $dev up; ip addr add fe80::2/64 dev $dev nodad
          ip -n net link set $dev up; ip -n net addr add fe80::1/64 dev $dev nodad
        done
        ip link set lan0 up; ip addr add fe80::2/64 dev lan0 nodad
        ip -n lan link set lan0 up; ip -n lan addr add fe80::9/64 dev lan0 nodad
        ip addr add 192.0.2.2/24 dev eth0; ip addr add 2001:db8:1::2/64 dev eth0 nodad
        ip addr add 198.51.100.2/24 dev eth1; ip addr add 2001:db8:2::2/64 dev eth1 nodad
        ip addr add 192.168.7.1/24 dev lan0; ip addr add 2001:db8:7::1/64 dev lan0 nodad
        ip -n net addr add 192.0.2.1/24 dev eth0; ip -n net addr add 2001:db8:1::1/64 dev eth0 nodad
        ip -n net addr add 198.51.100.1/24 dev eth1; ip -n net addr add 2001:db8:2::1/64 dev eth1 nodad
        ip -n net addr add 203.0.113.9/32 dev lo; ip -n net addr add 2001:db8:9::9/128 dev lo nodad
        ip -n net route add 192.168.7.0/24 via 192.0.2.2; ip -n net route add 2001:db8:7::/64 via 2001:db8:1::2
        ip -n lan addr add 192.168.7.9/24 dev lan0; ip -n lan addr add 2001:db8:7::9/64 dev lan0 nodad
        ip -n lan route add default via 192.168.7.1; ip -n lan -6 route add default via 2001:db8:7::1
        ip route add default via 192.0.2.1; ip -6 route add default via 2001:db8:1::1
        ip rule add priority 5000 from 198.51.100.2 lookup 200
        ip route add default via 198.51.100.1 table 200");
}

/// Puts things of other programs on the very numbers that ours would take.
pub(crate) fn add_foreigners() {
    sh(
        "for prio in 9000 9002 9042 9090; do
          ip rule add priority $prio fwmark 0x1000000/0x1000000 iif eth1 goto 32766 protocol kernel
          ip -6 rule add priority $prio fwmark 0x20000/0xff0000 lookup 2022
        done
        ip rule add priority 9090 nop
        ip route add 203.0.113.128/25 via 198.51.100.1 table 2022
        ip -6 route add throw 2001:db8:aaaa::/48 table 2023
        ip rule add priority 32764 not fwmark 0xca6c to 203.0.113.200 lookup 51820
        nft 'add table inet tunproxy { chain o { type filter hook output priority 0; meta mark 0x2000000 accept; }; }'",
    );
}

/// Switches the strict reverse-path filter on everywhere.
pub(crate) fn strict_reverse_path() {
    sh("for conf in /proc/sys/net/ipv4/conf/*; do echo 1 > $conf/rp_filter; done");
}

/// Everything that a run may change, in words that are equal when it is equal.
pub(crate) fn dump() -> String {
    let mut text = sh("ip -d link; ip -d addr; ip -d rule; ip -6 -d rule
        ip -d route show table all; ip -6 -d route show table all
        nft list ruleset; readlink /etc/resolv.conf || true; cat /etc/resolv.conf 2>/dev/null || echo none
        stat -c '%A %u %g' /etc/resolv.conf 2>/dev/null || true; ls /etc");
    text.push_str(&parameters(Path::new("/proc/sys/net/ipv4")));
    text.push_str(&parameters(Path::new("/proc/sys/net/ipv6")));
    text
}

fn parameters(directory: &Path) -> String {
    let mut paths: Vec<_> = fs::read_dir(directory).expect("read /proc/sys").flatten().map(|it| it.path()).collect();
    paths.sort();
    let mut text = String::new();
    for path in paths {
        if path.is_dir() {
            text.push_str(&parameters(&path));
        } else if let Ok(value) = fs::read_to_string(&path) {
            // Some parameters cannot be read while they are unset.
            text.push_str(&format!("{} = {value}", path.display()));
        }
    }
    text
}

/// Fails with the lines that differ.
#[track_caller]
pub(crate) fn assert_same(before: &str, after: &str) {
    let missing = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|it| it == *line)).map(str::to_owned).collect()
    };
    assert!(before == after, "gone: {:#?}\nnew: {:#?}", missing(before, after), missing(after, before));
}

pub(crate) fn options() -> HostOptions {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().expect("a prefix")).collect::<Vec<_>>();
    HostOptions {
        tun: TUN.to_owned(),
        addresses: nets(&["198.18.0.1/30", "fdfe:dcba:9877::1/126"]),
        fake: nets(&["198.18.0.0/15", "fdfe:dcba:9877::/64"]),
        mtu: 1500,
        auto_route: true,
        dns_hijack: true,
        dns_servers: vec!["198.18.0.2".parse().expect("an address"), "fdfe:dcba:9877::2".parse().expect("an address")],
        lan_dns: Vec::new(),
        route_address: Vec::new(),
        route_exclude: Vec::new(),
        include_interface: Vec::new(),
        exclude_interface: Vec::new(),
        include_uid: Vec::new(),
        exclude_uid: Vec::new(),
        auto_forward: false,
        strict_route: false,
        kill_switch: false,
        wishes: Wishes::default(),
    }
}

pub(crate) fn plan(options: &HostOptions) -> HostPlan {
    HostPlan::new(options, &Survey::take().expect("survey")).expect("plan")
}

/// Opens a TUN device that vanishes with the file.
pub(crate) fn open_tun(name: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open(NODE).expect("open /dev/net/tun");
    // struct ifreq: a name of 16 bytes, then the flags IFF_TUN | IFF_NO_PI.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&0x1001u16.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes one struct ifreq, which the buffer has room for.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
    assert_eq!(made, 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    file
}

/// Runs `body` on a thread in the named network namespace; what it opens stays there.
pub(crate) fn within<T: Send + 'static>(namespace: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let path = format!("/run/netns/{namespace}");
    thread::spawn(move || {
        setns(File::open(path).expect("the namespace"), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
        body()
    })
    .join()
    .expect("the thread in the namespace")
}
