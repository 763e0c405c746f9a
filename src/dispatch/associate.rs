//! Datagrams on their way: the association that carries them is found, or opened once for all that wait.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use super::live::Account;
use super::udp::{Link, MOST_WAITING, Peer, Waiting};
use super::{Back, Choice, Dispatcher, Unfaked, reach, with_host};
use crate::dns::Held;
use crate::net::{Address, DialError, Host, Lookup, LookupError, Reach};
use crate::outbound::Naming;
use crate::session::{Fact, Session};

/// An association that now serves a peer.
struct Opened {
    link: Rc<Link>,
    /// The peer as the outbound wants it written.
    to: Address,
    /// It is new, and this is its key if later peers may share it.
    fresh: Option<Option<Arc<str>>>,
    held: Option<Held>,
}

impl Dispatcher {
    /// Carries datagrams of one client to one peer: one, or with `size` several of that size, the last of which may be
    /// shorter. They may wait for [`flush`](Self::flush). `quoted` is the beginning of their packet, for ICMP errors; empty
    /// where there is none.
    pub fn packet(
        self: &Rc<Self>,
        session: &Session,
        payload: &[u8],
        size: Option<NonZeroU16>,
        dont_fragment: bool,
        quoted: &[u8],
        back: &Rc<dyn Back>,
    ) {
        let mut associations = self.associations.borrow_mut();
        if let Some(Peer::Open { link, to }) = associations.peer(session.source, &session.destination) {
            return self.gathering.borrow_mut().add(link, payload, size, to, dont_fragment);
        }
        drop(associations);
        // An empty datagram is one too.
        let each = size.map_or(payload.len().max(1), |size| usize::from(size.get()));
        let empty = payload.is_empty().then_some(payload);
        for payload in payload.chunks(each).chain(empty) {
            self.knock(session, payload, dont_fragment, quoted, back);
        }
    }

    /// Sends what [`packet`](Self::packet) has gathered. Due at the end of every turn that called it.
    pub fn flush(&self) {
        self.gathering.borrow_mut().flush();
    }

    /// Carries one datagram to a peer to which the way is not open yet.
    fn knock(
        self: &Rc<Self>,
        session: &Session,
        payload: &[u8],
        dont_fragment: bool,
        quoted: &[u8],
        back: &Rc<dyn Back>,
    ) {
        let (source, client) = (session.source, &session.destination);
        let mut associations = self.associations.borrow_mut();
        let full = associations.is_full();
        match associations.peer(source, client) {
            Some(Peer::Open { link, to }) => return link.send(payload, None, to, dont_fragment),
            Some(Peer::Opening(waiting)) => {
                if waiting.len() < MOST_WAITING {
                    waiting.push_back(Waiting { payload: payload.into(), dont_fragment });
                } else {
                    self.core.counters.datagrams_dropped.fetch_add(1, Relaxed);
                }
                return;
            }
            Some(Peer::Closed { why, until }) if Instant::now() < *until => {
                if let Some(why) = *why {
                    back.unreachable(client, source, quoted, why);
                }
                return;
            }
            Some(Peer::Closed { .. }) => {}
            None if full => {
                self.core.counters.datagrams_dropped.fetch_add(1, Relaxed);
                return;
            }
            None => {}
        }
        let waiting = VecDeque::from([Waiting { payload: payload.into(), dont_fragment }]);
        associations.set(source, client.clone(), Peer::Opening(waiting));
        drop(associations);
        // The IP header and eight bytes are all that an error has to quote.
        let quoted: Box<[u8]> = quoted[..quoted.len().min(128)].into();
        tokio::task::spawn_local(Rc::clone(self).open(session.clone(), quoted, Rc::clone(back)));
    }

    /// Opens the way to one peer, sends what waited, and carries answers while the association lives.
    async fn open(self: Rc<Self>, session: Session, quoted: Box<[u8]>, back: Rc<dyn Back>) {
        let (source, client) = (session.source, session.destination.clone());
        let mut account = Some(Account::new(Arc::clone(&self.core.counters), session.clone(), None));
        match self.find(session, &client, &back, &mut account).await {
            Ok(opened) => {
                let Opened { link, to, fresh, held } = opened;
                if let Some(account) = account {
                    account.joined();
                }
                link.introduce(to.clone(), client.clone(), &quoted, held);
                if let Some(key) = &fresh {
                    self.associations.borrow_mut().add(&link, key.clone());
                }
                self.release(source, &client, &link, &to);
                if fresh.is_some() {
                    link.run(&self.scratch).await;
                    self.associations.borrow_mut().remove(&link);
                }
            }
            Err(error) => {
                let why = reach(&error);
                if let Some(account) = account {
                    account.failed(&error, matches!(error, DialError::Rejected(_)));
                }
                self.refuse(source, &client, why, &quoted, &*back).await;
            }
        }
    }

    /// Sends what waited for a peer that is now open.
    fn release(&self, source: SocketAddr, client: &Address, link: &Rc<Link>, to: &Address) {
        let open = Peer::Open { link: Rc::clone(link), to: to.clone() };
        let before = self.associations.borrow_mut().set(source, client.clone(), open);
        if let Some(Peer::Opening(waiting)) = before {
            for datagram in waiting {
                link.send(&datagram.payload, None, to, datagram.dont_fragment);
            }
        }
    }

    async fn refuse(&self, source: SocketAddr, client: &Address, why: Option<Reach>, quoted: &[u8], back: &dyn Back) {
        if let Some(why) = why {
            back.unreachable(client, source, quoted, why);
        }
        let now = Instant::now();
        self.associations.borrow_mut().close(source, client, why, now);
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        self.associations.borrow_mut().reopen(source, client, Instant::now());
    }

    /// Decides, and finds or opens the association that carries the session.
    async fn find(
        &self,
        session: Session,
        client: &Address,
        back: &Rc<dyn Back>,
        account: &mut Option<Account>,
    ) -> Result<Opened, DialError> {
        let Unfaked { mut session, fake, held } = self.unfake(session)?;
        let Choice { outbound, verdict } = self.choose(&mut session).await?;
        let chain = Arc::clone(&verdict.chain);
        if let Some(account) = account {
            account.found(&session, fake);
            account.decided(verdict);
        }
        let source = session.source;
        let to = match outbound.naming() {
            Naming::Resolves => self.real(&mut session).await?,
            Naming::HandsOn => session.destination.clone(),
        };
        let named = matches!(to.host, Host::Name(_));
        if !named {
            let known = self.associations.borrow().shared(source, &chain, &to, client);
            if let Some(link) = known {
                return Ok(Opened { link, to, fresh: None, held });
            }
        }
        let datagram = outbound.associate(&session).await?;
        // Another peer of this client may have opened the shared association meanwhile.
        let known = if named { None } else { self.associations.borrow().shared(source, &chain, &to, client) };
        if let Some(link) = known {
            return Ok(Opened { link, to, fresh: None, held });
        }
        let idle = Link::idle_for(to.port, self.core.udp_timeout);
        let name = named.then(|| client.clone());
        let Some(mut account) = account.take() else { return Err(DialError::TimedOut) };
        account.opened();
        let counters = Arc::clone(&self.core.counters);
        let link = Link::new(source, datagram, Rc::clone(back), name, idle, account, counters);
        Ok(Opened { link, to, fresh: Some((!named).then_some(chain)), held })
    }

    /// The destination as an address, looked up if it is a name.
    async fn real(&self, session: &mut Session) -> Result<Address, DialError> {
        let port = session.destination.port;
        let ip = match (session.name().cloned(), session.ip()) {
            (_, Fact::Known(ip)) => ip,
            (Some(name), _) => {
                let addresses = self.core.dns.lookup(&name).await.map_err(|error| no_address(&name, &error))?;
                // The family that the client chose; datagrams cannot try the other one and see.
                let alike = addresses.iter().find(|ip| ip.is_ipv4() == session.source.is_ipv4());
                *alike.or(addresses.first()).ok_or(DialError::Unreachable(Reach::Host))?
            }
            (None, _) => return Err(DialError::Unreachable(Reach::Host)),
        };
        session.resolved = Fact::Known(ip);
        Ok(with_host(Host::Ip(ip), port))
    }
}

fn no_address(name: &crate::net::Name, error: &LookupError) -> DialError {
    DialError::Denied(format!("{name}: {error}"))
}
