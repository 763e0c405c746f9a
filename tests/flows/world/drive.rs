//! What drives a world: packets, tasks and the clock.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::task::Waker;
use std::time::Duration;

use tunproxy::stack::VirtioHeader;

use super::{Rough, Seen, World, link, packet};

/// A test that needs more virtual time than this waits for something that never comes.
const LIMIT: Duration = Duration::from_secs(4 * 3600);

impl World {
    /// Drives everything until `test` is done.
    pub(crate) fn run(&self, test: impl Future<Output = ()> + 'static) {
        let inner = &*self.0;
        let done = inner.executor.spawn_first(Box::pin(test));
        let mut left = false;
        loop {
            let ran = inner.executor.run();
            if done.get() {
                inner.executor.clear();
                return;
            }
            let moved = self.carry();
            let worked = self.turn(&mut left);
            if ran || moved || worked || left || inner.executor.is_awake() {
                inner.turns.set(inner.turns.get() + 1);
                continue;
            }
            let settling = std::mem::take(&mut *inner.settling.borrow_mut());
            if settling.is_empty() {
                self.jump();
            }
            settling.into_iter().for_each(Waker::wake);
        }
    }

    /// Moves packets that are due, in both directions.
    fn carry(&self) -> bool {
        let inner = &*self.0;
        let now = self.now();
        let mut moved = false;
        let written = inner.device.borrow_mut().take();
        for packet in written {
            moved = true;
            self.note(&packet, true);
            if let Some(mtu) = inner.net.hop.filter(|mtu| packet.len() > usize::from(*mtu)) {
                self.inject(&packet::too_big(&packet, mtu));
            } else if packet::destination(&packet) == inner.net.client() {
                inner.link.borrow_mut().enter(link::Way::ToClient, packet, VirtioHeader::PLAIN, now);
            } else {
                inner.peers.borrow_mut().push_back(Seen::read(&packet, true));
            }
        }
        let sent = inner.client.borrow_mut().poll(now);
        for (header, mut packet) in sent {
            moved = true;
            let more = match inner.net.rough == Rough::default() || header != VirtioHeader::PLAIN {
                true => None,
                false => inner.net.rough.change(&mut packet, &mut inner.random.borrow_mut()),
            };
            for (header, packet) in [(header, packet)].into_iter().chain(more.map(|more| (VirtioHeader::PLAIN, more))) {
                self.note(&packet, false);
                inner.link.borrow_mut().enter(link::Way::ToStack, packet, header, now);
            }
        }
        // As many as the worker reads before flows get their turn.
        for _ in 0..64 {
            let Some(parcel) = inner.link.borrow_mut().leave(now) else { break };
            moved = true;
            match parcel.way {
                link::Way::ToClient => inner.client.borrow_mut().receive(parcel.packet),
                link::Way::ToStack => drop(self.ingest(parcel.header, &parcel.packet)),
            }
        }
        moved
    }

    fn note(&self, packet: &[u8], to_client: bool) {
        if let Some(seen) = self.0.seen.borrow_mut().as_mut() {
            seen.push(Seen::read(packet, to_client));
        }
    }

    /// Polls the stack if it asked for that, as the worker does: after packets, when a flow stirred, when a timer is
    /// due, and when something was left.
    fn turn(&self, left: &mut bool) -> bool {
        let inner = &*self.0;
        let mut stack = inner.stack.borrow_mut();
        let stirred = inner.stir.0.swap(0, SeqCst) > 0;
        let due = stack.deadline().is_some_and(|deadline| deadline <= self.now());
        let ingested = inner.ingested.replace(false);
        if !(stirred || due || ingested || *left || stack.register(&Waker::from(Arc::clone(&inner.stir)))) {
            return false;
        }
        let mut device = inner.device.borrow_mut();
        device.room = inner.net.room;
        *left = stack.poll(self.now(), &mut *device);
        true
    }

    /// Lets time pass until something is due.
    fn jump(&self) {
        let inner = &*self.0;
        let sleepers = inner.sleepers.borrow().iter().map(|(due, _)| *due).min();
        let deadline = inner.stack.borrow().deadline();
        let client = inner.client.borrow_mut().deadline(self.now());
        let link = inner.link.borrow().deadline();
        let next = [sleepers, deadline, client, link].into_iter().flatten().min();
        let next = next.expect("the test waits, and nothing will ever happen");
        assert!(next - inner.start < LIMIT, "the test waits for more than {LIMIT:?}");
        inner.now.set(next.max(self.now()));
        let mut sleepers = inner.sleepers.borrow_mut();
        let (due, rest): (Vec<_>, Vec<_>) = sleepers.drain(..).partition(|(due, _)| *due <= self.now());
        *sleepers = rest;
        due.into_iter().for_each(|(_, waker)| waker.wake());
    }
}
