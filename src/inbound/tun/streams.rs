//! DNS over TCP to hijacked addresses: accepted at once, since no dial can say no, and therefore limited here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;

use crate::dispatch::Dispatcher;
use crate::dns::Asker;
use crate::stack::FlowStream;

/// Streams of one worker on which questions may be asked; one more is reset.
const MOST: usize = 512;
/// Of one source. Resolvers use one stream for many questions.
const MOST_OF_SOURCE: usize = 64;

/// The open streams, counted by source.
pub(super) struct Streams {
    /// This host: its address stands for all its programs, so it alone has no limit of its own.
    own: Vec<IpAddr>,
    open: RefCell<HashMap<IpAddr, usize>>,
}

/// A place among them; dropping it makes room.
pub(super) struct Place {
    streams: Rc<Streams>,
    source: IpAddr,
}

impl Streams {
    pub(super) fn new(own: Vec<IpAddr>) -> Rc<Self> {
        Rc::new(Self { own, open: RefCell::default() })
    }

    /// A place for one more stream of `source`, if there is one.
    fn enter(self: &Rc<Self>, source: IpAddr) -> Option<Place> {
        let mut open = self.open.borrow_mut();
        let all: usize = open.values().sum();
        let count = open.get(&source).copied().unwrap_or_default();
        if all >= MOST || count >= MOST_OF_SOURCE && !self.own.contains(&source) {
            return None;
        }
        open.insert(source, count + 1);
        Some(Place { streams: Rc::clone(self), source })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.streams.open.borrow_mut();
        match open.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(open.remove(&self.source)),
        }
    }
}

/// Answers the questions on one stream. Before its client has completed the handshake it costs no place here: it counts
/// among the flows being opened, which the stack limits in number and in time.
pub(super) async fn stream(dispatcher: Rc<Dispatcher>, streams: Rc<Streams>, asker: Asker, mut stream: FlowStream) {
    stream.accept();
    poll_fn(|cx| stream.poll_open(cx)).await;
    if let Some(_place) = streams.enter(asker.client) {
        dispatcher.names(stream, asker).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u32) -> IpAddr {
        std::net::Ipv4Addr::from(last).into()
    }

    #[test]
    fn one_source_cannot_take_all_places_unless_it_is_this_host() {
        let streams = Streams::new(vec![ip(1)]);
        let others: Vec<_> = std::iter::from_fn(|| streams.enter(ip(2))).collect();
        assert_eq!(others.len(), MOST_OF_SOURCE);
        let own: Vec<_> = std::iter::from_fn(|| streams.enter(ip(1))).collect();
        assert_eq!(own.len(), MOST - MOST_OF_SOURCE);
        assert!(streams.enter(ip(3)).is_none());
    }

    #[test]
    fn a_place_that_is_given_up_is_free_again() {
        let streams = Streams::new(Vec::new());
        let mut places: Vec<_> = (0..MOST as u32).map(|n| streams.enter(ip(n % 100)).unwrap()).collect();
        assert!(streams.enter(ip(5)).is_none());
        places.pop();
        assert!(streams.enter(ip(5)).is_some());
        drop(places);
        assert!(streams.open.borrow().is_empty());
    }
}
