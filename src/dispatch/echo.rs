//! Echo requests on their way: the router decides once for each (client, id, host), the rest travels without asking.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::associations::REFUSED_FOR;
use super::echo_way::{Flow, Opened, SMALLEST_V6_MTU, Way, Wire};
use super::echoes::{Entry, Key, Ticket, Waiting};
use super::live::Account;
use super::{Choice, Dispatcher, EchoBack, HOLD, Ping, Unfaked};
use crate::dns::Held;
use crate::net::{Address, DialError, Host, LONGER_HEADER, Reach, Reject};
use crate::outbound::Outbound;
use crate::session::{Inbound, Network, Session};

/// As much of a packet as an ICMP error may quote.
const QUOTED: usize = 1280;

impl Dispatcher {
    /// Carries one echo request. What cannot be carried is said through `back` at once.
    pub fn echo(self: &Rc<Self>, ping: &Ping<'_>, back: &Rc<dyn EchoBack>) {
        let key = Key { source: ping.source, destination: ping.destination, id: ping.echo.id };
        let mut echoes = self.echoes.borrow_mut();
        match echoes.find(&key) {
            Some(Entry::Open { way, flow }) => {
                let (way, flow) = (Rc::clone(way), Rc::clone(flow));
                drop(echoes);
                return self.request(&way, &flow, ping);
            }
            Some(Entry::Opening(_)) => {
                if !echoes.wait(&key, ping) {
                    self.core.counters.datagrams_dropped.fetch_add(1, Relaxed);
                }
                return;
            }
            Some(Entry::Closed { why, until }) if Instant::now() < *until => {
                if let Some(why) = *why {
                    back.unreachable(quoted(ping.packet), why);
                }
                return;
            }
            Some(Entry::Closed { .. }) | None => {}
        }
        let Some(ticket) = echoes.begin(key, ping) else { return };
        let task = spawn_local(Rc::clone(self).open_echo(ticket, Rc::clone(back)));
        echoes.attach(&ticket, task.abort_handle());
    }

    /// Opens the way for one (client, id, host) and sends what waited.
    async fn open_echo(self: Rc<Self>, ticket: Ticket, back: Rc<dyn EchoBack>) {
        let Key { source, destination, id } = ticket.key;
        let to = Address { host: Host::Ip(destination), port: 0 };
        let session = Session::new(Network::Icmp, Inbound::Tun, SocketAddr::new(source, id), to);
        let mut account = Account::new(std::sync::Arc::clone(&self.core.counters), session.clone(), None);
        let found = timeout(HOLD, self.find_echo(session, &mut account)).await.unwrap_or(Err(DialError::TimedOut));
        match found {
            Ok((way, wire, to, held)) => {
                let flow = Flow::new(ticket.key, Opened { to, wire, back, account, held });
                let waited = self.echoes.borrow_mut().enter(&ticket, &way, &flow);
                for waiting in waited.into_iter().flatten() {
                    self.request(&way, &flow, &waiting.ping(&ticket.key));
                }
            }
            Err(error) => {
                account.failed(&error, matches!(error, DialError::Rejected(_)));
                let why = reach(&error);
                let waited = self.echoes.borrow_mut().refuse(&ticket, why, Instant::now() + REFUSED_FOR);
                if waited.is_some() && self.echoes.borrow_mut().starts_sweeping() {
                    spawn_local(Rc::clone(&self).sweep());
                }
                if let Some(why) = why {
                    let tell = |waiting: Waiting| back.unreachable(quoted(&waiting.packet), why);
                    waited.into_iter().flatten().for_each(tell);
                }
            }
        }
    }

    /// Forgets what was refused, for as long as there is any: one for all, however many they are.
    async fn sweep(self: Rc<Self>) {
        loop {
            sleep(REFUSED_FOR).await;
            if !self.echoes.borrow_mut().sweep(Instant::now()) {
                return;
            }
        }
    }

    /// Decides, and finds or opens the socket that carries the session; with it comes the host's real address.
    async fn find_echo(
        self: &Rc<Self>,
        session: Session,
        account: &mut Account,
    ) -> Result<(Rc<Way>, Wire, IpAddr, Option<Held>), DialError> {
        let Unfaked { mut session, fake, held } = self.unfake(session)?;
        account.found(&session, fake);
        let Choice { outbound, verdict } = self.choose(&mut session).await?;
        account.decided(verdict);
        if !outbound.networks().carries(Network::Icmp) {
            return Err(DialError::Unsupported(format!("{} carries no echo requests", outbound.name())));
        }
        let to = match outbound.peer(&session).await?.host {
            Host::Ip(ip) => ip,
            // Whoever wants a name carries nothing: it says why not.
            Host::Name(_) => {
                outbound.echo(false)?;
                return Err(DialError::Unsupported(format!("{} looks no names up", outbound.name())));
            }
        };
        let (way, wire) = self.echo_way(&*outbound, to.is_ipv6())?;
        Ok((way, wire, to, held))
    }

    /// The socket of an outbound for one family, and an id on it. A raw socket serves everybody, one with an id of its own
    /// a single flow.
    pub(super) fn echo_way(self: &Rc<Self>, outbound: &dyn Outbound, ipv6: bool) -> Result<(Rc<Way>, Wire), DialError> {
        let name = outbound.chain().pop().unwrap_or_default();
        let shared = self.echoes.borrow().way(&name, ipv6);
        let (way, fresh) = match shared {
            Some(way) => (way, false),
            None => {
                let socket = match outbound.echo(ipv6) {
                    Err(DialError::Exhausted) if self.spare_a_descriptor() => outbound.echo(ipv6),
                    opened => opened,
                };
                (Way::new(socket?, ipv6), true)
            }
        };
        let wire = match way.own_id() {
            Some(id) => Wire::Given(id),
            None => Wire::Taken(self.core.echo_ids.take().ok_or(DialError::Exhausted)?),
        };
        if fresh {
            let mut echoes = self.echoes.borrow_mut();
            match way.own_id() {
                None => echoes.share(name, &way),
                Some(_) => echoes.mind_descriptors(),
            }
            drop(echoes);
            spawn_local(Rc::clone(self).hear(Rc::clone(&way)));
        }
        Ok((way, wire))
    }

    /// Sends a request as the router that we are: with one hop less to live. A socket that can send no more comes to its
    /// end, with all its flows, and the request opens another.
    pub(super) fn request(self: &Rc<Self>, way: &Rc<Way>, flow: &Flow, ping: &Ping<'_>) {
        match way.send(flow, ping) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.core.counters.datagrams_dropped.fetch_add(1, Relaxed);
            }
            Err(_) if way.is_stranded() => {
                self.echoes.borrow_mut().end(way, &"its interface is gone");
                self.echo(ping, &flow.back);
            }
            Err(error) => {
                let why = reach(&error).map(|why| match (why, ping.source.is_ipv4(), flow.to.is_ipv4()) {
                    // Our packet had the longer header, or the shorter one.
                    (Reach::TooBig(mtu), true, false) => Reach::TooBig(mtu.saturating_sub(LONGER_HEADER)),
                    (Reach::TooBig(mtu), false, true) => Reach::TooBig(mtu.saturating_add(LONGER_HEADER)),
                    (why, ..) => why,
                });
                let why = why.map(|why| match why {
                    Reach::TooBig(mtu) if ping.source.is_ipv6() => Reach::TooBig(mtu.max(SMALLEST_V6_MTU)),
                    why => why,
                });
                if let Some(why) = why {
                    flow.back.unreachable(quoted(ping.packet), why);
                }
            }
        }
    }

    /// Hands over what comes back, for as long as the socket works and has flows.
    async fn hear(self: Rc<Self>, way: Rc<Way>) {
        let idle = self.core.icmp_timeout;
        while let Some(look) = way.next_look(idle, Instant::now()) {
            tokio::select! {
                biased;
                error = poll_fn(|cx| way.poll_arrivals(cx, &self.scratch)) => {
                    self.echoes.borrow_mut().end(&way, &error);
                    return;
                }
                () = sleep_until(look) => {
                    let over = way.over(idle, Instant::now());
                    let mut echoes = self.echoes.borrow_mut();
                    over.iter().for_each(|key| echoes.forget(key, &"idle"));
                }
                () = way.emptied() => {}
            }
        }
        self.echoes.borrow_mut().end(&way, &"idle");
    }
}

/// What the sender of an echo request is told; None is silence.
fn reach(error: &DialError) -> Option<Reach> {
    match (error, error.kind()) {
        // Lost where there is no room, or what it was for did not answer: the program waits as for a dead host.
        (
            DialError::Rejected(Reject::Drop) | DialError::Exhausted | DialError::NoPort | DialError::NoControlPort,
            _,
        )
        | (_, io::ErrorKind::TimedOut) => None,
        (DialError::Rejected(Reject::Answer) | DialError::Unsupported(_), _) => Some(Reach::Prohibited),
        (DialError::Unreachable(why), _) => Some(*why),
        (_, io::ErrorKind::NetworkUnreachable) => Some(Reach::Network),
        _ => Some(Reach::Host),
    }
}

fn quoted(packet: &[u8]) -> &[u8] {
    &packet[..packet.len().min(QUOTED)]
}

#[cfg(test)]
#[path = "echo_tests.rs"]
mod tests;
