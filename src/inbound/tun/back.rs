//! The way back to clients behind the device, for answers that come from tasks.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;
use std::task::Waker;

use super::writer::Writer;
use crate::dispatch::{Back, EchoBack, Quote};
use crate::net::{Address, Echo, EchoFailure, Reach};
use crate::stack::{EchoError, EchoReply, Stack, Unreachable};

/// Errors that wait for the end of a turn; more than these are dropped (RFC 4443 2.4 f asks for a limit anyway).
const MOST_ERRORS: usize = 256;

/// Writes datagrams at once, and ICMP errors at the end of the turn: they may arise while the stack is at work.
pub(super) struct TunBack {
    stack: Rc<RefCell<Stack>>,
    writer: Rc<RefCell<Writer>>,
    errors: RefCell<Vec<(Box<[u8]>, Unreachable)>>,
    waker: Cell<Option<Waker>>,
    /// This host's addresses on the device.
    own: Vec<IpAddr>,
}

impl TunBack {
    pub(super) fn new(stack: Rc<RefCell<Stack>>, writer: Rc<RefCell<Writer>>, own: Vec<IpAddr>) -> Self {
        Self { stack, writer, errors: RefCell::default(), waker: Cell::default(), own }
    }

    /// Emits the errors that came up.
    pub(super) fn flush(&self) {
        let errors = std::mem::take(&mut *self.errors.borrow_mut());
        let (mut stack, mut writer) = (self.stack.borrow_mut(), self.writer.borrow_mut());
        for (quoted, why) in errors {
            stack.unreachable(&quoted, why, &mut *writer);
        }
    }

    /// Wakes `waker` at the next error. True if one waits already.
    pub(super) fn register(&self, waker: &Waker) -> bool {
        self.waker.set(Some(waker.clone()));
        !self.errors.borrow().is_empty()
    }

    fn queue(&self, quoted: &[u8], why: Reach) {
        let mut errors = self.errors.borrow_mut();
        if quoted.is_empty() || errors.len() >= MOST_ERRORS {
            return;
        }
        let why = match why {
            Reach::Network => Unreachable::Network,
            Reach::Host => Unreachable::Host,
            Reach::Port => Unreachable::Port,
            Reach::Protocol => Unreachable::Protocol,
            Reach::Prohibited => Unreachable::Prohibited,
            Reach::TooBig(mtu) => Unreachable::TooBig(mtu),
            Reach::Coded(code) => Unreachable::Coded(code),
        };
        errors.push((quoted.into(), why));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Back for TunBack {
    fn deliver(&self, from: &Address, to: SocketAddr, payload: &[u8]) {
        let Some(from) = from.socket().filter(|from| from.is_ipv4() == to.is_ipv4()) else { return };
        self.stack.borrow_mut().send(from, to, payload, &mut *self.writer.borrow_mut());
    }

    fn deliver_train(&self, from: &Address, to: SocketAddr, train: &[u8], size: NonZeroU16) {
        let Some(from) = from.socket().filter(|from| from.is_ipv4() == to.is_ipv4()) else { return };
        self.stack.borrow_mut().send_train(from, to, train, size, &mut *self.writer.borrow_mut());
    }

    fn unreachable(&self, _from: &Address, _to: SocketAddr, quoted: &[u8], why: Reach) {
        self.queue(quoted, why);
    }

    fn is_paced(&self, client: IpAddr) -> bool {
        !self.own.contains(&client)
    }
}

impl EchoBack for TunBack {
    fn reply(&self, from: IpAddr, to: IpAddr, reply: &Echo<'_>) {
        let Echo { id, sequence, payload, ttl, tos, .. } = *reply;
        let reply = EchoReply { id, sequence, payload, ttl, tos };
        self.stack.borrow_mut().reply(from, to, &reply, &mut *self.writer.borrow_mut());
    }

    fn error(&self, router: Option<IpAddr>, to: IpAddr, message: EchoFailure, quote: &Quote<'_>) {
        let (EchoFailure { kind, code, word }, Quote { head, ttl, payload }) = (message, *quote);
        let error = EchoError { kind, code, word, head, ttl, payload };
        self.stack.borrow_mut().echo_error(router, to, &error, &mut *self.writer.borrow_mut());
    }

    fn unreachable(&self, quoted: &[u8], why: Reach) {
        self.queue(quoted, why);
    }
}
