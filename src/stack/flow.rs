//! One TCP flow as its task sees it: a stream whose bytes are read and written in place, in the flow's own rings.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{self, RecvError, State};

use super::Tuple;
use super::budget::Share;
use super::heartbeat::Heartbeat;
use super::port::Cut;
use super::progress::{Progress, is_ahead};
use super::ring::Rings;
use super::tcp::Segment;

/// How a flow is turned away, as its client will see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A reset: connection refused.
    Reset,
    /// ICMP network unreachable.
    Network,
    /// ICMP host unreachable.
    Host,
    /// ICMP protocol unreachable.
    Protocol,
    /// ICMP administratively prohibited.
    Prohibited,
    /// Another code of ICMP type 3.
    Coded(u8),
    /// No answer at all: the client times out.
    Silent,
}

/// A flow's state, shared by the stack and the flow's task.
pub(super) struct Flow {
    pub(super) tuple: Tuple,
    /// Dropped before `rings`, from which its buffers are borrowed.
    pub(super) sockets: SocketSet<'static>,
    pub(super) handle: SocketHandle,
    pub(super) rings: Rings,
    /// What is paid for the flow itself.
    pub(super) place: Share,
    /// How super-packets to this client are cut, where that is not smoltcp's affair.
    pub(super) cut: Option<Cut>,
    /// The first bytes of the SYN, for an ICMP error to quote; present while the SYN-ACK is held.
    pub(super) held: Option<Box<[u8]>>,
    /// Counted among the flows whose SYN-ACK is held.
    pub(super) counted: bool,
    /// No longer in the table; only its task still looks at it.
    pub(super) dead: bool,
    /// In the queue of flows that have something to emit.
    pub(super) dirty: bool,
    /// Its task is gone; the stack removes it once TCP has come to an end.
    pub(super) orphan: bool,
    /// Ended by [`Stack::abort_all`](super::Stack::abort_all), not by its client.
    pub(super) aborted: bool,
    /// Ended to make room for others.
    pub(super) evicted: bool,
    pub(super) refusal: Option<Refusal>,
    /// FIN is to follow as soon as the handshake is over, since smoltcp would send it in place of the SYN-ACK; or as soon
    /// as all data was sent, since in LAST-ACK smoltcp does not take windows from a client that acknowledges nothing new.
    pub(super) finishing: bool,
    /// The time for which the stack's timer queue holds an entry.
    pub(super) armed: Option<Instant>,
    /// Who waits for the other side of its relay, by direction, and still has to learn of the flow's end.
    pub(super) watchers: [Option<Waker>; 2],
    /// Who waits for memory for what it has to send; present while the flow is in [`Shared::starving`].
    pub(super) starving: Option<Waker>,
    /// Told when the client takes something.
    pub(super) heartbeat: Option<Arc<Heartbeat>>,
    pub(super) progress: Progress,
}

/// Places in [`Flow::watchers`].
const RECEIVING: usize = 0;
const SENDING: usize = 1;

/// What flows tell the stack between its turns.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) dirty: RefCell<Vec<Rc<RefCell<Flow>>>>,
    pub(super) waker: Cell<Option<Waker>>,
    /// Flows that found no memory for what they have to send, each once. Held weakly: a flow that ends meanwhile gives its
    /// rings back.
    pub(super) starving: RefCell<Vec<Weak<RefCell<Flow>>>>,
}

impl Shared {
    /// Wakes `waker` when there may be memory again, and nobody else of this flow.
    fn starve(&self, flow: &Rc<RefCell<Flow>>, inner: &mut Flow, waker: &Waker) {
        match &mut inner.starving {
            Some(known) => known.clone_from(waker),
            none => {
                *none = Some(waker.clone());
                self.starving.borrow_mut().push(Rc::downgrade(flow));
            }
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Wakes whoever waits for memory.
    pub(super) fn feed(&self) {
        let starving = std::mem::take(&mut *self.starving.borrow_mut());
        let wakers = starving.iter().filter_map(Weak::upgrade).filter_map(|flow| flow.borrow_mut().starving.take());
        wakers.for_each(Waker::wake);
    }

    /// Has the flow served in the stack's next turn.
    pub(super) fn queue(&self, flow: &Rc<RefCell<Flow>>, inner: &mut Flow) {
        if !inner.dirty {
            inner.dirty = true;
            self.dirty.borrow_mut().push(Rc::clone(flow));
        }
    }

    /// The same, and wakes the stack.
    pub(super) fn mark(&self, flow: &Rc<RefCell<Flow>>, inner: &mut Flow) {
        self.queue(flow, inner);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Flow {
    pub(super) fn socket(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Why nothing can be moved any more.
    fn loss(&self) -> io::Error {
        let kind = match (self.aborted, self.evicted) {
            (true, _) => io::ErrorKind::ConnectionAborted,
            (false, true) => io::ErrorKind::OutOfMemory,
            (false, false) => io::ErrorKind::ConnectionReset,
        };
        kind.into()
    }

    /// Whether the receive ring holds neither data to read nor data beyond a gap.
    fn receive_ring_is_empty(&mut self) -> bool {
        let queued = self.socket().recv_queue();
        queued == 0 && self.progress.highest == self.progress.next(0)
    }

    /// The sequence number that the client is to send next, and how many bytes from there on the receive ring takes.
    pub(super) fn expects(&mut self) -> (u32, usize) {
        let socket = self.socket();
        let (queued, capacity) = (socket.recv_queue(), socket.recv_capacity());
        (self.progress.next(queued), capacity - queued)
    }

    /// Ends the flow after a panic in its own code: its task sees a reset.
    pub(super) fn give_up(&mut self) {
        self.held = None;
        self.socket().abort();
    }

    /// Whether it ended by anything else than the FINs of both sides.
    fn is_broken(&mut self) -> bool {
        !self.progress.finished && self.socket().state() == State::Closed
    }

    /// Wakes `waker` when the flow comes to its end. smoltcp's own wakers would do so too, and at every segment.
    fn watch(&mut self, way: usize, waker: &Waker) {
        match &mut self.watchers[way] {
            Some(known) if known.will_wake(waker) => {}
            place => *place = Some(waker.clone()),
        }
    }

    /// Marks it as gone from the table, and tells whoever waits for something else.
    pub(super) fn bury(&mut self) {
        self.dead = true;
        self.watchers.iter_mut().chain([&mut self.starving]).filter_map(Option::take).for_each(Waker::wake);
    }

    /// FIN, now or behind the handshake.
    pub(super) fn finish(&mut self) {
        self.finishing = match self.socket().state() {
            State::SynReceived => true,
            State::CloseWait => self.progress.recovery.has_unsent(),
            _ => false,
        };
        if !self.finishing {
            self.socket().close();
        }
    }

    /// Sends the FIN for which it was too early until now. False: there is none.
    pub(super) fn close_late(&mut self) -> bool {
        let late = self.finishing && self.socket().state() != State::SynReceived;
        if late {
            self.finish();
        }
        late && !self.finishing
    }

    /// The sequence number of the earliest byte that smoltcp takes for unacknowledged, or of our FIN.
    pub(super) fn unacknowledged(&mut self) -> u32 {
        let (written, socket) = (self.progress.recovery.written(), self.socket());
        let closing = matches!(socket.state(), State::FinWait2 | State::TimeWait | State::Closed);
        written.wrapping_sub(low_bits(socket.send_queue())).wrapping_add(u32::from(closing))
    }

    /// The sequence number of bare acknowledgements: see [`Progress::place`].
    pub(super) fn place_of_bare(&mut self) -> Option<u32> {
        let start = self.unacknowledged();
        self.progress.place(start)
    }

    /// Whether `segment` acknowledges nothing that was never sent, and nothing older than the largest window before what
    /// is not acknowledged (RFC 5961 section 5.2).
    pub(super) fn is_sane(&mut self, segment: &Segment) -> bool {
        let (start, most) = (self.unacknowledged(), self.socket().send_capacity());
        let Some((end, number)) = self.progress.end().zip(segment.acknowledgement) else { return false };
        is_ahead(end, number) && (is_ahead(number, start) || start.wrapping_sub(number) as usize <= most)
    }

    /// Whether both directions have come to their ends, so that nobody needs a task any more.
    fn is_over(&mut self) -> bool {
        let finishing = self.finishing;
        let socket = self.socket();
        let ended = match socket.state() {
            State::Closing | State::LastAck | State::TimeWait | State::Closed => true,
            state => state == State::CloseWait && finishing,
        };
        ended && socket.recv_queue() == 0
    }

    /// Gives the rings' pages back if they hold nothing.
    pub(super) fn release_if_empty(&mut self) {
        if self.receive_ring_is_empty() && self.socket().send_queue() == 0 {
            self.rings.release();
        }
    }

    /// Has smoltcp send keep-alives until the client is heard. False: it has been asked already, or owes an answer to
    /// something else, or to nobody.
    pub(super) fn ask_for_sign(&mut self, again: Duration) -> bool {
        let socket = self.sockets.get_mut::<tcp::Socket<'static>>(self.handle);
        let open = matches!(socket.state(), State::Established | State::CloseWait | State::FinWait2);
        if !open || socket.send_queue() > 0 || self.progress.probing {
            return false;
        }
        self.progress.probing = true;
        socket.set_keep_alive(Some(again.into()));
        true
    }

    /// A segment has come from the client.
    pub(super) fn heard(&mut self, now: Instant) {
        self.progress.heard = now;
        if std::mem::take(&mut self.progress.probing) {
            self.socket().set_keep_alive(None);
        }
    }
}

/// The client's side of a TCP flow. While the SYN-ACK is held it can only be accepted, refused or watched.
///
/// Dropping it aborts a flow whose two directions are not both finished: the client sees a reset.
pub struct FlowStream {
    pub(super) flow: Rc<RefCell<Flow>>,
    pub(super) shared: Rc<Shared>,
}

impl std::fmt::Debug for FlowStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FlowStream")
    }
}

impl FlowStream {
    /// Sends the SYN-ACK that was held back.
    pub fn accept(&mut self) {
        let mut flow = self.flow.borrow_mut();
        flow.held = None;
        flow.socket().pause_synack(false);
        self.shared.mark(&self.flow, &mut flow);
    }

    /// Turns the flow away before it was accepted.
    pub fn refuse(self, refusal: Refusal) {
        self.flow.borrow_mut().refusal = Some(refusal);
    }

    /// Ready when the client gave up on a flow that is still held.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut flow = self.flow.borrow_mut();
        let socket = flow.socket();
        // A reset sends a held socket back to LISTEN; an accepted one is nobody's to give up.
        if matches!(socket.state(), State::Listen | State::Closed) {
            return Poll::Ready(());
        }
        socket.register_recv_waker(cx.waker());
        Poll::Pending
    }

    /// Ready when the handshake is over: the client has answered the SYN-ACK, or the flow has come to its end.
    pub fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut flow = self.flow.borrow_mut();
        let socket = flow.socket();
        if socket.state() != State::SynReceived {
            return Poll::Ready(());
        }
        socket.register_recv_waker(cx.waker());
        Poll::Pending
    }

    /// Hands the bytes that wait to `read`, which says how many it took. `Ok(0)` means the client sent FIN; bytes that
    /// `read` cannot take stay in the ring, and the client's window closes. Whatever `read` waits for, the end of the
    /// flow wakes the task too: bytes that nobody takes are given up when the client resets.
    ///
    /// # Errors
    /// `ConnectionReset` when the client sent RST, `ConnectionAborted` after [`Stack::abort_all`](super::Stack::abort_all),
    /// `OutOfMemory` if the flow was ended to make room for others, and what `read` reports.
    pub fn poll_recv_with(
        &mut self,
        cx: &mut Context<'_>,
        read: impl FnOnce(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let mut flow = self.flow.borrow_mut();
        let flow = &mut *flow;
        if flow.evicted {
            // What lies in its ring is the room that others wait for.
            return Poll::Ready(Err(flow.loss()));
        }
        let socket = flow.sockets.get_mut::<tcp::Socket<'static>>(flow.handle);
        if !socket.can_recv() {
            return match socket.recv(|_| (0, ())) {
                Err(RecvError::Finished) => Poll::Ready(Ok(0)),
                Err(RecvError::InvalidState) if socket.state() != State::SynReceived => Poll::Ready(Err(flow.loss())),
                _ => {
                    socket.register_recv_waker(cx.waker());
                    Poll::Pending
                }
            };
        }
        let outcome = socket.recv(|bytes| match read(cx, bytes) {
            Poll::Ready(Ok(taken)) => (taken, Poll::Ready(Ok(taken))),
            other => (0, other),
        });
        match outcome {
            Ok(Poll::Ready(Ok(taken))) => {
                flow.progress.consumed = flow.progress.consumed.wrapping_add(low_bits(taken));
                // The window may have opened enough to be announced.
                self.shared.mark(&self.flow, flow);
                Poll::Ready(Ok(taken))
            }
            Ok(Poll::Pending) if flow.is_broken() => Poll::Ready(Err(flow.loss())),
            Ok(Poll::Pending) => {
                flow.watch(RECEIVING, cx.waker());
                Poll::Pending
            }
            Ok(other) => other,
            Err(_) => Poll::Ready(Err(flow.loss())),
        }
    }

    /// Hands free space to `write`, which says how many bytes it put there. `Ok(0)` means that `write` has no more.
    /// Whatever `write` waits for, the end of the flow wakes the task too.
    ///
    /// # Errors
    /// `ConnectionReset` when the client sent RST, `ConnectionAborted` after [`Stack::abort_all`](super::Stack::abort_all),
    /// `OutOfMemory` if the flow was ended to make room for others, and what `write` reports.
    pub fn poll_send_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl FnOnce(&mut Context<'_>, &mut [u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let mut flow = self.flow.borrow_mut();
        let flow = &mut *flow;
        let socket = flow.sockets.get_mut::<tcp::Socket<'static>>(flow.handle);
        if !socket.can_send() {
            if !socket.may_send() && socket.state() != State::SynReceived {
                return Poll::Ready(Err(flow.loss()));
            }
            socket.register_send_waker(cx.waker());
            return Poll::Pending;
        }
        let fresh = flow.rings.charged() == 0;
        if fresh && !flow.rings.charge() {
            self.shared.starve(&self.flow, flow, cx.waker());
            return Poll::Pending;
        }
        let mut place = 0;
        let outcome = socket.send(|space| {
            place = space.as_mut_ptr().expose_provenance();
            match write(cx, space) {
                Poll::Ready(Ok(put)) => (put, Poll::Ready(Ok(put))),
                other => (0, other),
            }
        });
        if fresh && !matches!(outcome, Ok(Poll::Ready(Ok(1..)))) {
            // Nothing lies there, so nothing is to be paid.
            flow.rings.release();
        }
        match outcome {
            Ok(Poll::Ready(Ok(put))) => {
                if put > 0 {
                    flow.rings.wrote(place, put);
                    flow.progress.recovery.wrote(put);
                }
                self.shared.mark(&self.flow, flow);
                Poll::Ready(Ok(put))
            }
            Ok(Poll::Pending) => {
                flow.watch(SENDING, cx.waker());
                Poll::Pending
            }
            Ok(other) => other,
            Err(_) => Poll::Ready(Err(flow.loss())),
        }
    }

    /// Tells `heartbeat` from now on whenever the client has acknowledged something new: what was written moves still.
    pub fn watch(&mut self, heartbeat: Arc<Heartbeat>) {
        self.flow.borrow_mut().heartbeat = Some(heartbeat);
    }

    /// Ready once the client has acknowledged everything, a FIN of ours included, or is gone.
    pub fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut flow = self.flow.borrow_mut();
        let finishing = flow.finishing;
        let socket = flow.socket();
        let waiting = finishing || matches!(socket.state(), State::FinWait1 | State::Closing | State::LastAck);
        if !waiting && socket.send_queue() == 0 {
            return Poll::Ready(());
        }
        if matches!(socket.state(), State::Closed | State::Listen) {
            return Poll::Ready(());
        }
        socket.register_send_waker(cx.waker());
        Poll::Pending
    }

    /// Sends FIN behind what was written; reading goes on.
    pub fn shutdown(&mut self) {
        let mut flow = self.flow.borrow_mut();
        flow.finish();
        self.shared.mark(&self.flow, &mut flow);
    }

    /// Sends RST.
    pub fn abort(&mut self) {
        let mut flow = self.flow.borrow_mut();
        flow.socket().abort();
        self.shared.mark(&self.flow, &mut flow);
    }
}

impl Drop for FlowStream {
    fn drop(&mut self) {
        let mut flow = self.flow.borrow_mut();
        flow.orphan = true;
        if flow.held.is_some() {
            // Not accepted: the stack answers as `refusal` says, by a reset if nobody chose.
            flow.refusal.get_or_insert(Refusal::Reset);
        } else if !flow.is_over() {
            flow.socket().abort();
        }
        self.shared.mark(&self.flow, &mut flow);
    }
}

/// The low 32 bits of a byte count, as sequence numbers take them.
pub(super) fn low_bits(bytes: usize) -> u32 {
    (bytes & 0xffff_ffff) as u32
}
