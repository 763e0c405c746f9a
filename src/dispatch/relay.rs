//! Moving bytes between a client and its upstream, both ways, each way until its own end (half-close is kept).
//!
//! Bytes go from the flow's ring straight into the upstream's socket and back: one copy in user space per direction.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::live::Account;
use crate::net::BoxStream;
use crate::stack::FlowStream;

/// Turns of one direction before other flows get theirs.
const SHARE: usize = 16;

/// How a relayed flow ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// Both sides finished in order.
    #[error("finished")]
    Finished,
    /// The client reset it.
    #[error("reset by the client")]
    ClientReset,
    /// The upstream failed or reset it.
    #[error("reset by the upstream: {0}")]
    Upstream(io::Error),
}

/// Takes bytes out of a buffer that is lent to it.
type Read<'a> = &'a mut dyn FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>;
/// Puts bytes into a buffer that is lent to it.
type Write<'a> = &'a mut dyn FnMut(&mut Context<'_>, &mut [u8]) -> Poll<io::Result<usize>>;

/// The client's side of a relay: something that lends its buffers.
pub(crate) trait Client {
    /// Hands waiting bytes to `read`; `Ok(0)` is the end.
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>>;
    /// Hands free space to `write`; `Ok(0)` means it has no more.
    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>>;
    /// Sends what is buffered, then FIN.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// Sends RST.
    fn abort(&mut self);
}

impl Client for FlowStream {
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>> {
        self.poll_recv_with(cx, read)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>> {
        self.poll_send_with(cx, write)
    }

    fn poll_finish(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutdown();
        Poll::Ready(Ok(()))
    }

    fn abort(&mut self) {
        FlowStream::abort(self);
    }
}

/// A client that is a stream itself (the proxy inbounds), with a buffer for each direction.
pub(crate) struct Buffered {
    stream: BoxStream,
    up: Buffer,
    down: Buffer,
}

struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: vec![0; 64 << 10].into_boxed_slice(), start: 0, end: 0 }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

impl Buffered {
    pub(crate) fn new(stream: BoxStream) -> Self {
        Self { stream, up: Buffer::new(), down: Buffer::new() }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.down.is_empty() {
            let bytes = &self.down.bytes[self.down.start..self.down.end];
            match Pin::new(&mut *self.stream).poll_write(cx, bytes) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => self.down.start += written,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Pin::new(&mut *self.stream).poll_flush(cx)
    }
}

impl Client for Buffered {
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>> {
        if self.up.is_empty() {
            let mut buffer = ReadBuf::new(&mut self.up.bytes);
            match Pin::new(&mut *self.stream).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) if buffer.filled().is_empty() => return Poll::Ready(Ok(0)),
                Poll::Ready(Ok(())) => (self.up.start, self.up.end) = (0, buffer.filled().len()),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        let outcome = read(cx, &self.up.bytes[self.up.start..self.up.end]);
        if let Poll::Ready(Ok(taken)) = outcome {
            self.up.start += taken;
        }
        outcome
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>> {
        match self.poll_drain(cx) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            Poll::Pending => return Poll::Pending,
        }
        let outcome = write(cx, &mut self.down.bytes);
        if let Poll::Ready(Ok(put)) = outcome {
            (self.down.start, self.down.end) = (0, put);
            // Whatever does not go out now goes before the next read, or at the end.
            if let Poll::Ready(Err(error)) = self.poll_drain(cx) {
                return Poll::Ready(Err(error));
            }
        }
        outcome
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.poll_drain(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut *self.stream).poll_shutdown(cx),
            other => other,
        }
    }

    fn abort(&mut self) {
        self.stream.reset();
    }
}

/// One direction's state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    Finishing,
    Done,
}

/// Relays until both directions are done or one side fails; the other side is then reset too.
pub(crate) async fn relay<C: Client>(client: &mut C, upstream: &mut BoxStream, account: &mut Account) -> End {
    let (mut up, mut down) = (Way::Open, Way::Open);
    let mut unflushed = false;
    let end = poll_fn(|cx| {
        let sent = poll_up(cx, client, upstream, &mut up, &mut unflushed, account);
        if let Poll::Ready(Err(end)) = sent {
            return Poll::Ready(end);
        }
        if let Poll::Ready(Err(end)) = poll_down(cx, client, upstream, &mut down, account) {
            return Poll::Ready(end);
        }
        if up == Way::Done && down == Way::Done { Poll::Ready(End::Finished) } else { Poll::Pending }
    })
    .await;
    match &end {
        End::Finished => {}
        End::ClientReset => upstream.reset(),
        End::Upstream(_) => client.abort(),
    }
    end
}

fn poll_up<C: Client>(
    cx: &mut Context<'_>,
    client: &mut C,
    upstream: &mut BoxStream,
    way: &mut Way,
    unflushed: &mut bool,
    account: &mut Account,
) -> Poll<Result<(), End>> {
    for _ in 0..SHARE {
        if *way == Way::Open {
            let mut failure = None;
            let outcome =
                client.poll_recv(cx, &mut |cx, bytes| match Pin::new(&mut **upstream).poll_write(cx, bytes) {
                    Poll::Ready(Err(error)) => {
                        failure = Some(error);
                        Poll::Ready(Err(io::ErrorKind::Other.into()))
                    }
                    Poll::Ready(Ok(0)) if !bytes.is_empty() => {
                        failure = Some(io::ErrorKind::WriteZero.into());
                        Poll::Ready(Err(io::ErrorKind::Other.into()))
                    }
                    other => other,
                });
            if let Some(error) = failure {
                return Poll::Ready(Err(End::Upstream(error)));
            }
            match outcome {
                Poll::Ready(Ok(0)) => *way = Way::Finishing,
                Poll::Ready(Ok(bytes)) => {
                    *unflushed = true;
                    account.moved(bytes as u64, 0);
                    continue;
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(End::ClientReset)),
                Poll::Pending => return poll_flush(cx, upstream, unflushed),
            }
        }
        if *way == Way::Finishing {
            match Pin::new(&mut **upstream).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => *way = Way::Done,
                // The upstream may be gone already, which the other direction reports if it matters.
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => *way = Way::Done,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(End::Upstream(error))),
                Poll::Pending => return Poll::Pending,
            }
        }
        return Poll::Ready(Ok(()));
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// TLS and the like keep a part of what was written until they are told to send it.
fn poll_flush(cx: &mut Context<'_>, upstream: &mut BoxStream, unflushed: &mut bool) -> Poll<Result<(), End>> {
    if *unflushed {
        match Pin::new(&mut **upstream).poll_flush(cx) {
            Poll::Ready(Ok(())) => *unflushed = false,
            Poll::Ready(Err(error)) => return Poll::Ready(Err(End::Upstream(error))),
            Poll::Pending => {}
        }
    }
    Poll::Pending
}

fn poll_down<C: Client>(
    cx: &mut Context<'_>,
    client: &mut C,
    upstream: &mut BoxStream,
    way: &mut Way,
    account: &mut Account,
) -> Poll<Result<(), End>> {
    for _ in 0..SHARE {
        if *way == Way::Open {
            let mut failure = None;
            let outcome = client.poll_send(cx, &mut |cx, space| {
                let mut buffer = ReadBuf::new(space);
                match Pin::new(&mut **upstream).poll_read(cx, &mut buffer) {
                    Poll::Ready(Ok(())) => Poll::Ready(Ok(buffer.filled().len())),
                    Poll::Ready(Err(error)) => {
                        failure = Some(error);
                        Poll::Ready(Err(io::ErrorKind::Other.into()))
                    }
                    Poll::Pending => Poll::Pending,
                }
            });
            if let Some(error) = failure {
                return Poll::Ready(Err(End::Upstream(error)));
            }
            match outcome {
                Poll::Ready(Ok(0)) => *way = Way::Finishing,
                Poll::Ready(Ok(bytes)) => {
                    account.moved(0, bytes as u64);
                    continue;
                }
                Poll::Ready(Err(_)) => return Poll::Ready(Err(End::ClientReset)),
                Poll::Pending => return Poll::Pending,
            }
        }
        if *way == Way::Finishing {
            match client.poll_finish(cx) {
                Poll::Ready(Ok(())) => *way = Way::Done,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(End::ClientReset)),
                Poll::Pending => return Poll::Pending,
            }
        }
        return Poll::Ready(Ok(()));
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// A held or accepted flow as a byte stream, for protocols that we speak with the client ourselves (DNS over TCP).
pub(crate) struct FlowIo(pub(crate) FlowStream);

impl AsyncRead for FlowIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.0
            .poll_recv_with(cx, |_, bytes| {
                let take = bytes.len().min(buffer.remaining());
                buffer.put_slice(&bytes[..take]);
                Poll::Ready(Ok(take))
            })
            .map_ok(drop)
    }
}

impl AsyncWrite for FlowIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_send_with(cx, |_, space| {
            let put = bytes.len().min(space.len());
            space[..put].copy_from_slice(&bytes[..put]);
            Poll::Ready(Ok(put))
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.shutdown();
        Poll::Ready(Ok(()))
    }
}
