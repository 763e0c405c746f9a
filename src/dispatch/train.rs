//! Datagrams that a turn brings for one peer of an association, gathered so that they leave in one call.

use std::num::NonZeroU16;
use std::rc::Rc;

use super::link::{Flow, Link};

/// Bytes and datagrams of a train: what one call of the kernel takes.
pub(super) const LONGEST: usize = 64_000;
const MOST: usize = 64;
/// Buffers kept for the next turn.
const MOST_SPARE: usize = 16;

/// Datagrams to one peer, one behind the other: all of one size, but for the last, which may be shorter.
pub(super) struct Train {
    pub(super) flow: Rc<Flow>,
    pub(super) size: NonZeroU16,
    pub(super) dont_fragment: bool,
    pub(super) bytes: Vec<u8>,
}

impl Train {
    /// Adds a datagram. False: it has to begin another train.
    fn add(&mut self, payload: &[u8], flow: &Rc<Flow>, dont_fragment: bool) -> bool {
        let size = usize::from(self.size.get());
        let ended = !self.bytes.len().is_multiple_of(size);
        let full = self.bytes.len() + payload.len() > LONGEST || self.bytes.len() / size >= MOST;
        let alike = payload.len() <= size && dont_fragment == self.dont_fragment && Rc::ptr_eq(flow, &self.flow);
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
        flow: &Rc<Flow>,
        dont_fragment: bool,
    ) {
        let length = u16::try_from(payload.len()).ok().and_then(NonZeroU16::new);
        let (None, Some(length)) = (size, length) else {
            // It is a train already, or can be part of none.
            self.send(link);
            return link.send(payload, size, flow, dont_fragment);
        };
        if let Some(train) = link.train.borrow_mut().as_mut() {
            if train.add(payload, flow, dont_fragment) {
                return;
            }
        } else {
            self.links.push(Rc::clone(link));
        }
        self.send(link);
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.extend_from_slice(payload);
        *link.train.borrow_mut() = Some(Train { flow: Rc::clone(flow), size: length, dont_fragment, bytes });
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
        let Some(Train { flow, size, dont_fragment, mut bytes }) = train else { return };
        link.send(&bytes, Some(size), &flow, dont_fragment);
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

    use parking_lot::Mutex;
    use tokio::io::ReadBuf;

    use super::*;
    use crate::dispatch::Counters;
    use crate::dispatch::fixture::{Heard, flow};
    use crate::net::{Address, Datagram, Received};

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

    fn address(text: &str) -> Address {
        text.parse::<SocketAddr>().unwrap().into()
    }

    fn link(room: usize) -> (Rc<Link>, Arc<Mutex<Vec<Call>>>, Arc<Counters>) {
        let (calls, counters) = (Arc::default(), Arc::<Counters>::default());
        let tape = Box::new(Tape { calls: Arc::clone(&calls), room });
        let source = "192.0.2.1:4000".parse().unwrap();
        (Link::new(source, Heard::back(), tape, None, Arc::clone(&counters)), calls, counters)
    }

    #[test]
    fn datagrams_of_one_size_leave_together_and_a_shorter_one_is_the_last() {
        let (link, calls, _) = link(99);
        let (to, mut gathering) = (address("198.51.100.1:53"), Gathering::default());
        let flow = flow(&link, &to);
        for payload in [&b"aaaa"[..], b"bbbb", b"cc", b"dddd", b"eeeee"] {
            gathering.add(&link, payload, None, &flow, false);
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
        let (to_one, to_two) = (flow(&link, &one), flow(&link, &two));
        gathering.add(&link, b"1", None, &to_one, false);
        gathering.add(&link, b"2", None, &to_two, false);
        gathering.add(&link, b"3", None, &to_two, true);
        gathering.add(&link, b"", None, &to_two, true);
        gathering.add(&link, b"4", None, &to_two, true);
        gathering.add(&link, b"556", NonZeroU16::new(2), &to_two, true);
        gathering.add(&link, b"7", None, &to_one, false);
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
        let flow = flow(&link, &to);
        for size in [10, 1200, 40_000] {
            for _ in 0..MOST + 1 {
                gathering.add(&link, &vec![7; size], None, &flow, false);
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
        let flow = flow(&link, &to);
        for number in 0..MOST as u8 {
            gathering.add(&link, &[number], None, &flow, false);
        }
        gathering.flush();
        assert!(calls.lock().is_empty());
        assert_eq!(counters.snapshot()["datagrams_dropped"], 0);
        // The place of one train is full now.
        gathering.add(&link, b"!", None, &flow, false);
        gathering.flush();
        assert_eq!(counters.snapshot()["datagrams_dropped"], 1);
    }
}
