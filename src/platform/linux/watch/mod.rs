//! Waiting until something has changed on the host. Nothing is polled: the kernel tells of links, addresses, routes,
//! rules, forwarding and nftables by netlink, and of the resolver's files by inotify.

mod directory;
mod files;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

pub use directory::DirectoryWatch;
use files::Files;
use netlink_packet_core::NetlinkBuffer;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netlink::next_hops;
use super::netlink::route::announced;
use super::survey::matters;
use crate::platform::applied::Seen;
use crate::platform::routing::RouteTable;

/// Multicast groups of NETLINK_ROUTE (linux/rtnetlink.h): links, addresses, routes, rules and the parameters of
/// forwarding and reverse-path filters, of both families.
const ROUTE_GROUPS: [u32; 9] = [1, 5, 7, 8, 9, 11, 19, 24, 25];
/// `NFNLGRP_NFTABLES`.
const NFTABLES_GROUP: u32 = 7;
/// `RTNLGRP_NEXTHOP`: what routes go by, where they do not say it themselves. Since Linux 5.3.
const NEXT_HOP_GROUP: u32 = 32;
/// `RTM_NEWROUTE` and `RTM_DELROUTE`.
const ROUTES: [u16; 2] = [24, 25];
/// What is told of nftables and matters here: tables, chains and rules that come or go (linux/netfilter/nf_tables.h).
/// Elements of sets, of which a busy firewall changes thousands, do not.
const NFTABLES: [u16; 6] = [0xa00, 0xa02, 0xa03, 0xa05, 0xa06, 0xa08];
/// One change is rarely alone: so long nothing more must have been told before anybody looks,
const QUIET: Duration = Duration::from_millis(50);
/// but no longer than this after the first.
const LONGEST: Duration = Duration::from_millis(300);
/// The kernel builds messages of at most 32 KB.
const RECEIVE_SIZE: usize = 64 * 1024;

/// Why a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// Something has changed, and nothing more for a moment.
    Changed(Seen),
    /// The time is up.
    Time,
    /// The other end of the pipe is closed.
    Stop,
}

/// The ears of a run. What changes between two waits is told by the second.
pub struct Watch {
    route: Socket,
    nftables: Option<Socket>,
    files: Option<Files>,
    /// Of routes, those in these tables matter whatever they are.
    tables: Vec<RouteTable>,
    stop: io::PipeReader,
}

impl Watch {
    /// Begins to listen, in the network namespace of the calling thread. `tables`: those of ours. `behind`: a file that
    /// matters as /etc/resolv.conf does. When the other end of `stop` closes, waiting is over.
    ///
    /// # Errors
    /// Netlink is closed to us. Where only nftables or the files cannot be listened to, a warning says so.
    pub fn open(tables: &[RouteTable], behind: Option<&Path>, stop: io::PipeReader) -> io::Result<Self> {
        let route = listen(NETLINK_ROUTE, &ROUTE_GROUPS)?;
        if let Err(error) = route.add_membership(NEXT_HOP_GROUP) {
            tracing::debug!("this kernel has no objects for next hops: {error}");
        }
        let nftables = listen(NETLINK_NETFILTER, &[NFTABLES_GROUP]);
        let nftables = nftables.inspect_err(|error| tracing::warn!("changes of nftables go unnoticed: {error}")).ok();
        let files = Files::watch(behind);
        let files = files.inspect_err(|error| tracing::warn!("changes of resolv.conf go unnoticed: {error}")).ok();
        Ok(Self { route, nftables, files, tables: tables.to_vec(), stop })
    }

    /// Has our tables be these from now on.
    pub fn follow(&mut self, tables: &[RouteTable]) {
        self.tables = tables.to_vec();
    }

    /// Waits until something has changed, or for as long as `most` says. `lifeline`: a descriptor whose other end belongs
    /// to what holds the firewall table; that it is closed is a change of nftables.
    ///
    /// # Errors
    /// The sockets do not work any more.
    pub fn wait(&mut self, most: Option<Duration>, lifeline: Option<BorrowedFd<'_>>) -> io::Result<Woken> {
        let end = most.map(|most| Instant::now() + most);
        let mut seen: Option<Seen> = None;
        let mut last: Option<Instant> = None;
        loop {
            if let (Some(seen), Some(deadline)) = (seen, last)
                && left(deadline).is_zero()
            {
                return Ok(Woken::Changed(seen));
            }
            let timeout = last.map_or_else(|| end.map(left), |deadline| Some(QUIET.min(left(deadline))));
            match self.poll(timeout, lifeline.filter(|_| seen.is_none_or(|seen| !seen.firewall)))? {
                Ready::Stop => return Ok(Woken::Stop),
                Ready::Nothing => return Ok(seen.map_or(Woken::Time, Woken::Changed)),
                Ready::Told(None) => {}
                Ready::Told(Some(more)) => {
                    let known = seen.get_or_insert_default();
                    known.firewall |= more.firewall;
                    known.resolver |= more.resolver;
                    last.get_or_insert_with(|| Instant::now() + LONGEST);
                }
            }
        }
    }

    /// Waits for `time`, and hears only a stop; what changes meanwhile is told later. True: stop.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn rest(&self, time: Duration) -> io::Result<bool> {
        let end = Instant::now() + time;
        loop {
            let mut fds = [PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout(Some(left(end)))) {
                Ok(0) if left(end).is_zero() => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn poll(&mut self, most: Option<Duration>, lifeline: Option<BorrowedFd<'_>>) -> io::Result<Ready> {
        let route = borrowed(&self.route);
        let nftables = self.nftables.as_ref().map(borrowed);
        let files = self.files.as_ref().map(AsFd::as_fd);
        let input = PollFlags::POLLIN;
        let mut fds = vec![PollFd::new(self.stop.as_fd(), input), PollFd::new(route, input)];
        // Nothing asked for: a hang-up is told all the same.
        let optional = [(nftables, input), (files, input), (lifeline, PollFlags::empty())];
        fds.extend(optional.iter().filter_map(|(fd, flags)| Some(PollFd::new((*fd)?, *flags))));
        match poll(&mut fds, timeout(most)) {
            Ok(0) => return Ok(Ready::Nothing),
            Err(nix::errno::Errno::EINTR) => return Ok(Ready::Told(None)),
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        let mut ready = fds.iter().map(|fd| fd.any().unwrap_or(true));
        let mut next = |there: bool| there && ready.next().unwrap_or_default();
        let (stop, route) = (next(true), next(true));
        let (nftables, files, dead) = (next(nftables.is_some()), next(files.is_some()), next(lifeline.is_some()));
        drop(fds);
        if stop {
            return Ok(Ready::Stop);
        }
        let mut seen = None;
        if route {
            let tables = &self.tables;
            note(&mut seen, drain(&self.route, |kind, payload| route_matters(kind, payload, tables))?, Seen::default());
        }
        if let Some(socket) = self.nftables.as_ref().filter(|_| nftables) {
            let told = drain(socket, |kind, _| NFTABLES.contains(&kind))?;
            note(&mut seen, told, Seen { firewall: true, resolver: false });
        }
        if let Some(watched) = self.files.as_mut().filter(|_| files) {
            let told = match watched.changed() {
                Ok(true) => Told::Something,
                Ok(false) => Told::Nothing,
                Err(error) => {
                    tracing::warn!("changes of resolv.conf go unnoticed from now on: {error}");
                    self.files = None;
                    Told::Something
                }
            };
            note(&mut seen, told, Seen { firewall: false, resolver: true });
        }
        if dead {
            note(&mut seen, Told::Something, Seen { firewall: true, resolver: false });
        }
        Ok(Ready::Told(seen))
    }
}

enum Ready {
    Nothing,
    Stop,
    Told(Option<Seen>),
}

/// What a socket had to tell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Something,
    /// More than there was room for.
    TooMuch,
}

fn note(seen: &mut Option<Seen>, told: Told, what: Seen) {
    let what = match told {
        Told::Nothing => return,
        Told::Something => what,
        Told::TooMuch => Seen::EVERYTHING,
    };
    let known = seen.get_or_insert_default();
    known.firewall |= what.firewall;
    known.resolver |= what.resolver;
}

/// Whether a message of NETLINK_ROUTE is about something that we or the layout depend on. A router may learn hundreds of
/// routes a second that are neither.
fn route_matters(kind: u16, payload: &[u8], tables: &[RouteTable]) -> bool {
    if next_hops::OBJECTS.contains(&kind) {
        return next_hops::are_all_that_routes_say();
    }
    if !ROUTES.contains(&kind) {
        return true;
    }
    announced(payload).is_some_and(|route| tables.contains(&route.table) || matters(&route))
}

/// Reads all that waits.
fn drain(socket: &Socket, matters: impl Fn(u16, &[u8]) -> bool) -> io::Result<Told> {
    let mut told = Told::Nothing;
    let mut bytes = Vec::with_capacity(RECEIVE_SIZE);
    loop {
        bytes.clear();
        match socket.recv(&mut bytes, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(told),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                told = Told::TooMuch;
                continue;
            }
            Err(error) => return Err(error),
        }
        let mut rest = bytes.as_slice();
        while let Ok(message) = NetlinkBuffer::new_checked(rest) {
            if told == Told::Nothing && matters(message.message_type(), message.payload()) {
                told = Told::Something;
            }
            // Padded to four bytes (NLMSG_ALIGN, netlink(7)).
            let length = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn listen(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    groups.iter().try_for_each(|group| socket.add_membership(*group))?;
    Ok(socket)
}

fn borrowed(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the socket's own, which is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
}

/// Rounded up: a wait that ends early would be waited for again.
fn timeout(most: Option<Duration>) -> PollTimeout {
    most.map_or(PollTimeout::NONE, |most| {
        PollTimeout::try_from(most + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
    })
}
