//! The task's side of a flow, in `async` words.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use tunproxy::stack::{FlowStream, Heartbeat, Refusal, Tuple};

use super::pattern;

/// A [`FlowStream`] whose two directions may be used by two tasks' worth of code in one.
#[derive(Clone)]
pub(crate) struct Flow {
    pub(crate) tuple: Tuple,
    stream: Rc<RefCell<Option<FlowStream>>>,
}

impl Flow {
    pub(super) fn new(tuple: Tuple, stream: FlowStream) -> Self {
        Self { tuple, stream: Rc::new(RefCell::new(Some(stream))) }
    }

    fn with<T>(&self, act: impl FnOnce(&mut FlowStream) -> T) -> T {
        act(self.stream.borrow_mut().as_mut().expect("the stream is still there"))
    }

    /// The same for tasks that may outlive the stream.
    fn poll<T>(&self, act: impl FnOnce(&mut FlowStream) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match self.stream.borrow_mut().as_mut() {
            Some(stream) => act(stream),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    pub(crate) fn accept(&self) {
        self.with(FlowStream::accept);
    }

    pub(crate) fn shutdown(&self) {
        self.with(FlowStream::shutdown);
    }

    pub(crate) fn abort(&self) {
        self.with(FlowStream::abort);
    }

    pub(crate) fn refuse(self, refusal: Refusal) {
        self.stream.borrow_mut().take().expect("the stream is still there").refuse(refusal);
    }

    /// Drops the stream, whoever else holds this.
    pub(crate) fn close(&self) {
        drop(self.stream.borrow_mut().take());
    }

    pub(crate) fn watch(&self, heartbeat: &Arc<Heartbeat>) {
        self.with(|stream| stream.watch(Arc::clone(heartbeat)));
    }

    /// Whether nobody has dropped the stream.
    pub(crate) fn is_open(&self) -> bool {
        self.stream.borrow().is_some()
    }

    pub(crate) async fn gone(&self) {
        poll_fn(|cx| self.with(|stream| stream.poll_gone(cx))).await;
    }

    pub(crate) async fn flushed(&self) {
        poll_fn(|cx| self.with(|stream| stream.poll_flushed(cx))).await;
    }

    /// Up to `most` bytes; none is the end.
    pub(crate) async fn read(&self, most: usize) -> io::Result<Vec<u8>> {
        let mut taken = Vec::new();
        poll_fn(|cx| {
            self.poll(|stream| {
                stream.poll_recv_with(cx, |_, bytes| {
                    taken = bytes[..bytes.len().min(most)].to_vec();
                    Poll::Ready(Ok(taken.len()))
                })
            })
        })
        .await?;
        Ok(taken)
    }

    pub(crate) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let put = poll_fn(|cx| {
                self.poll(|stream| {
                    stream.poll_send_with(cx, |_, space| {
                        let put = space.len().min(bytes.len());
                        space[..put].copy_from_slice(&bytes[..put]);
                        Poll::Ready(Ok(put))
                    })
                })
            })
            .await?;
            bytes = &bytes[put..];
        }
        Ok(())
    }

    /// Waits for room to write without having anything to say, as a relay with a quiet upstream does. Ends with the
    /// error that it is told.
    pub(crate) async fn failed_send(&self) -> io::Error {
        let ended: io::Result<usize> =
            poll_fn(|cx| self.poll(|stream| stream.poll_send_with(cx, |_, _| Poll::Pending))).await;
        ended.expect_err("nothing was written")
    }

    /// Offers what waits to somebody who takes nothing, as a relay with a stalled upstream does. Ends with the error that
    /// it is told.
    pub(crate) async fn stalled(&self) -> io::Error {
        let ended: io::Result<usize> =
            poll_fn(|cx| self.poll(|stream| stream.poll_recv_with(cx, |_, _| Poll::Pending))).await;
        ended.expect_err("nothing was moved")
    }

    /// Reads to the end.
    pub(crate) async fn read_all(&self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            let part = self.read(usize::MAX).await?;
            if part.is_empty() {
                return Ok(all);
            }
            all.extend(part);
        }
    }

    pub(crate) async fn write_pattern(&self, length: usize) -> io::Result<()> {
        let mut at = 0;
        while at < length {
            let part = pattern(at, (length - at).min(60_000));
            self.write(&part).await?;
            at += part.len();
        }
        Ok(())
    }

    /// Reads to the end and returns how long it was; what came must be the pattern.
    pub(crate) async fn read_pattern(&self) -> io::Result<usize> {
        let mut at = 0;
        loop {
            let part = self.read(usize::MAX).await?;
            if part.is_empty() {
                return Ok(at);
            }
            assert!(part == pattern(at, part.len()), "other bytes than were sent, after {at}");
            at += part.len();
        }
    }
}
