//! Datagrams that a turn brings for one peer of an association, gathered so that they leave in one call.

use std::num::NonZeroU16;
use std::rc::Rc;

use super::udp::Link;
use crate::net::Address;

/// Bytes and datagrams of a train: what one call of the kernel takes.
pub(super) const LONGEST: usize = 64_000;
const MOST: usize = 64;
/// Buffers kept for the next turn.
const MOST_SPARE: usize = 16;

/// Datagrams to one peer, one behind the other: all of one size, but for the last, which may be shorter.
pub(super) struct Train {
    pub(super) to: Address,
    pub(super) size: NonZeroU16,
    pub(super) dont_fragment: bool,
    pub(super) bytes: Vec<u8>,
}

impl Train {
    /// Adds a datagram. False: it has to begin another train.
    fn add(&mut self, payload: &[u8], to: &Address, dont_fragment: bool) -> bool {
        let size = usize::from(self.size.get());
        let ended = !self.bytes.len().is_multiple_of(size);
        let full = self.bytes.len() + payload.len() > LONGEST || self.bytes.len() / size >= MOST;
        let alike = payload.len() <= size && dont_fragment == self.dont_fragment && *to == self.to;
        if ended || full || !alike {
            return false;
        }
        self.bytes.extend_from_slice(payload);
        true
    }
}

/// The associations that have something gathered. Nothing stays here beyond a turn.
#[derive(Default)]
pub(super) struct Gathering {
    links: Vec<Rc<Link>>,
    spare: Vec<Vec<u8>>,
}

impl Gathering {
    /// Takes datagrams of the client: one, or with `size` several of that size. Those of an association leave in the order
    /// in which they came.
    pub(super) fn add(
        &mut self,
        link: &Rc<Link>,
        payload: &[u8],
        size: Option<NonZeroU16>,
        to: &Address,
        dont_fragment: bool,
    ) {
        let length = u16::try_from(payload.len()).ok().and_then(NonZeroU16::new);
        let (None, Some(length)) = (size, length) else {
            // It is a train already, or can be part of none.
            self.send(link);
            return link.send(payload, size, to, dont_fragment);
        };
        if let Some(train) = link.train.borrow_mut().as_mut() {
            if train.add(payload, to, dont_fragment) {
                return;
            }
        } else {
            self.links.push(Rc::clone(link));
        }
        self.send(link);
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.extend_from_slice(payload);
        *link.train.borrow_mut() = Some(Train { to: to.clone(), size: length, dont_fragment, bytes });
    }

    /// Sends all that was gathered.
    pub(super) fn flush(&mut self) {
        let mut links = std::mem::take(&mut self.links);
        for link in links.drain(..) {
            self.send(&link);
        }
        self.links = links;
    }

    fn send(&mut self, link: &Link) {
        let train = link.train.borrow_mut().take();
        let Some(Train { to, size, dont_fragment, mut bytes }) = train else { return };
        link.send(&bytes, Some(size), &to, dont_fragment);
        if self.spare.len() < MOST_SPARE {
            bytes.clear();
            self.spare.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::task::{Context, Poll};
    use std::time::Duration;

    use parking_lot::Mutex;
    use tokio::io::ReadBuf;

    use super::*;
    use crate::dispatch::{Account, Back, Counters};
    use crate::net::{Datagram, Reach, Received};
    use crate::session::{Fact, Inbound, Network, Session};

    /// One call: the bytes, the size of each datagram in them, to whom, and DF.
    type Call = (Vec<u8>, u16, Address, bool);

    /// A transport that writes down what it is asked to send, as long as there is room.
    struct Tape {
        calls: Arc<Mutex<Vec<Call>>>,
        room: usize,
    }

    impl Datagram for Tape {
        fn poll_send_to(
            &mut self,
            _: &mut Context<'_>,
            payload: &[u8],
            to: &Address,
            df: bool,
        ) -> Poll<io::Result<()>> {
            if self.room == 0 {
                return Poll::Pending;
            }
            self.room -= 1;
            self.calls.lock().push((payload.to_vec(), 0, to.clone(), df));
            Poll::Ready(Ok(()))
        }

        fn poll_send_train(
            &mut self,
            _: &mut Context<'_>,
            train: &[u8],
            size: NonZeroU16,
            to: &Address,
            df: bool,
        ) -> Poll<io::Result<usize>> {
            if self.room == 0 {
                return Poll::Pending;
            }
            self.room -= 1;
            self.calls.lock().push((train.to_vec(), size.get(), to.clone(), df));
            Poll::Ready(Ok(train.len()))
        }

        fn poll_recv_from(&mut self, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
            Poll::Pending
        }
    }

    struct Nobody;

    impl Back for Nobody {
        fn deliver(&self, _: &Address, _: SocketAddr, _: &[u8]) {}
        fn unreachable(&self, _: &Address, _: SocketAddr, _: &[u8], _: Reach) {}
    }

    fn address(text: &str) -> Address {
        text.parse::<SocketAddr>().unwrap().into()
    }

    fn link(room: usize) -> (Rc<Link>, Arc<Mutex<Vec<Call>>>, Arc<Counters>) {
        let (calls, counters) = (Arc::default(), Arc::<Counters>::default());
        let source = "192.0.2.1:4000".parse().unwrap();
        let session = Session {
            network: Network::Udp,
            inbound: Inbound::Tun,
            source,
            destination: address("198.51.100.1:53"),
            resolved: Fact::Unknown,
        };
        let account = Account::new(Arc::clone(&counters), session, None);
        let tape = Box::new(Tape { calls: Arc::clone(&calls), room });
        let link =
            Link::new(source, tape, Rc::new(Nobody), None, Duration::from_secs(9), account, Arc::clone(&counters));
        (link, calls, counters)
    }

    #[test]
    fn datagrams_of_one_size_leave_together_and_a_shorter_one_is_the_last() {
        let (link, calls, _) = link(99);
        let (to, mut gathering) = (address("198.51.100.1:53"), Gathering::default());
        for payload in [&b"aaaa"[..], b"bbbb", b"cc", b"dddd", b"eeeee"] {
            gathering.add(&link, payload, None, &to, false);
        }
        gathering.flush();
        let expected = [
            (b"aaaabbbbcc".to_vec(), 4, to.clone(), false),
            (b"dddd".to_vec(), 4, to.clone(), false),
            (b"eeeee".to_vec(), 5, to, false),
        ];
        assert_eq!(*calls.lock(), expected);
        gathering.flush();
        assert_eq!(calls.lock().len(), 3);
    }

    #[test]
    fn peers_fragmentation_and_what_cannot_be_gathered_keep_their_order() {
        let (link, calls, _) = link(99);
        let (one, two, mut gathering) = (address("198.51.100.1:53"), address("198.51.100.2:53"), Gathering::default());
        gathering.add(&link, b"1", None, &one, false);
        gathering.add(&link, b"2", None, &two, false);
        gathering.add(&link, b"3", None, &two, true);
        gathering.add(&link, b"", None, &two, true);
        gathering.add(&link, b"4", None, &two, true);
        gathering.add(&link, b"556", NonZeroU16::new(2), &two, true);
        gathering.add(&link, b"7", None, &one, false);
        gathering.flush();
        let expected = [
            (b"1".to_vec(), 1, one.clone(), false),
            (b"2".to_vec(), 1, two.clone(), false),
            (b"3".to_vec(), 1, two.clone(), true),
            (b"".to_vec(), 0, two.clone(), true),
            (b"4".to_vec(), 1, two.clone(), true),
            (b"556".to_vec(), 2, two, true),
            (b"7".to_vec(), 1, one, false),
        ];
        assert_eq!(*calls.lock(), expected);
    }

    #[test]
    fn a_train_stays_within_what_one_call_takes() {
        let (link, calls, _) = link(99);
        let (to, mut gathering) = (address("198.51.100.1:53"), Gathering::default());
        for size in [10, 1200, 40_000] {
            for _ in 0..MOST + 1 {
                gathering.add(&link, &vec![7; size], None, &to, false);
            }
            gathering.flush();
            let calls = std::mem::take(&mut *calls.lock());
            assert!(calls.iter().all(|(bytes, ..)| bytes.len() <= LONGEST && bytes.len() <= MOST * size));
            assert_eq!(calls.iter().map(|(bytes, ..)| bytes.len()).sum::<usize>(), (MOST + 1) * size);
            gathering = Gathering::default();
            link.train.borrow_mut().take();
        }
    }

    #[test]
    fn what_a_full_transport_does_not_take_waits_and_is_sent_later() {
        let (link, calls, counters) = link(0);
        let (to, mut gathering) = (address("198.51.100.1:53"), Gathering::default());
        for number in 0..MOST as u8 {
            gathering.add(&link, &[number], None, &to, false);
        }
        gathering.flush();
        assert!(calls.lock().is_empty());
        assert_eq!(counters.snapshot()["datagrams_dropped"], 0);
        // The place of one train is full now.
        gathering.add(&link, b"!", None, &to, false);
        gathering.flush();
        assert_eq!(counters.snapshot()["datagrams_dropped"], 1);
    }

    /// Answers with what it is given, then with silence.
    struct Answering(std::collections::VecDeque<(Vec<u8>, Address)>);

    impl Datagram for Answering {
        fn poll_send_to(&mut self, _: &mut Context<'_>, _: &[u8], _: &Address, _: bool) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_recv_from(&mut self, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<Received>> {
            let next = self.0.pop_front().ok_or_else(|| io::Error::other("the end"));
            Poll::Ready(next.map(|(payload, from)| {
                buffer.put_slice(&payload);
                Received::Payload(from)
            }))
        }
    }

    /// Writes down what it is handed.
    #[derive(Default)]
    struct Heard(std::cell::RefCell<Vec<(Address, Vec<u8>, u16)>>);

    impl Back for Heard {
        fn deliver(&self, from: &Address, _: SocketAddr, payload: &[u8]) {
            self.0.borrow_mut().push((from.clone(), payload.to_vec(), 0));
        }

        fn deliver_train(&self, from: &Address, _: SocketAddr, train: &[u8], size: NonZeroU16) {
            self.0.borrow_mut().push((from.clone(), train.to_vec(), size.get()));
        }

        fn unreachable(&self, _: &Address, _: SocketAddr, _: &[u8], _: Reach) {}
    }

    #[tokio::test]
    async fn answers_that_come_one_by_one_are_handed_over_together() {
        let (one, two) = (address("198.51.100.1:53"), address("198.51.100.2:53"));
        let answers = [("aa", &one), ("bb", &one), ("c", &one), ("dd", &one), ("", &one), ("ee", &two), ("fff", &two)];
        let answers = answers.map(|(payload, from)| (payload.as_bytes().to_vec(), from.clone()));
        let heard = Rc::new(Heard::default());
        let counters = Arc::<Counters>::default();
        let source: SocketAddr = "192.0.2.1:4000".parse().unwrap();
        let session = Session {
            network: Network::Udp,
            inbound: Inbound::Tun,
            source,
            destination: one.clone(),
            resolved: Fact::Unknown,
        };
        let account = Account::new(Arc::clone(&counters), session, None);
        let back: Rc<dyn Back> = heard.clone();
        let transport = Box::new(Answering(answers.into()));
        let link = Link::new(source, transport, back, None, Duration::from_secs(9), account, counters);
        link.run(&std::cell::RefCell::new(vec![0; crate::dispatch::udp::SCRATCH].into())).await;
        let expected = [
            (one.clone(), b"aabbc".to_vec(), 2),
            (one.clone(), b"dd".to_vec(), 0),
            (one, Vec::new(), 0),
            (two.clone(), b"ee".to_vec(), 0),
            (two, b"fff".to_vec(), 0),
        ];
        assert_eq!(*heard.0.borrow(), expected);
    }
}
