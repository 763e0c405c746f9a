//! Moving bytes between a client and its upstream, both ways, each way until its own end (half-close is kept).
//!
//! Bytes go from the flow's ring straight into the upstream's socket and back: one copy in user space per direction.

mod buffered;
mod flow;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::time::timeout;

pub(crate) use buffered::Buffered;
pub(crate) use flow::FlowIo;

use super::live::Account;
use crate::net::{BoxStream, Stream};
use crate::stack::Heartbeat;

/// Turns of one direction before other flows get theirs.
const SHARE: usize = 16;
/// How long a client may take what came before its upstream failed; then it is reset all the same.
const LAST_WORDS: Duration = Duration::from_secs(60);

/// How a relayed flow ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum End {
    /// Both sides finished in order.
    #[error("finished")]
    Finished,
    /// The client reset it.
    #[error("reset by the client")]
    ClientReset,
    /// The program ends.
    #[error("we stopped")]
    Stopped,
    /// It made room for others.
    #[error("evicted: no memory is left")]
    Evicted,
    /// It made room for others.
    #[error("evicted: no descriptors are left")]
    GaveWay,
    /// The upstream failed or reset it.
    #[error("reset by the upstream: {0}")]
    Upstream(io::Error),
}

impl End {
    /// What a failure on the client's side means.
    fn without_client(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionAborted => Self::Stopped,
            io::ErrorKind::OutOfMemory => Self::Evicted,
            _ => Self::ClientReset,
        }
    }
}

/// Takes bytes out of a buffer that is lent to it.
type Read<'a> = &'a mut dyn FnMut(&mut Context<'_>, &[u8]) -> Poll<io::Result<usize>>;
/// Puts bytes into a buffer that is lent to it.
type Write<'a> = &'a mut dyn FnMut(&mut Context<'_>, &mut [u8]) -> Poll<io::Result<usize>>;

/// The client's side of a relay: something that lends its buffers.
pub(crate) trait Client {
    /// Hands waiting bytes to `read`; `Ok(0)` is the end. If `read` waits, the client's reset wakes the task too.
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>>;
    /// Hands free space to `write`; `Ok(0)` means it has no more.
    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>>;
    /// Sends what is buffered, then FIN.
    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// Ready once the client has acknowledged everything, or is gone.
    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()>;
    /// Sends RST.
    fn abort(&mut self);
    /// Tells `heartbeat` when the client takes something of what was written, as far as that is known.
    fn watch(&mut self, _heartbeat: Arc<Heartbeat>) {}
}

/// One direction's state.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    Finishing,
    Done,
}

/// Relays until both directions are done or one side fails; the other side is then reset too. A client whose upstream
/// fails gets first what came before that.
pub(crate) async fn relay<C: Client>(client: &mut C, upstream: &mut BoxStream, account: &mut Account) -> End {
    let (up, down) = (Way::Open, Way::Open);
    let mut relay = Relay { client, upstream, account, up, down, unflushed: false, in_order: false };
    let end = poll_fn(|cx| relay.poll(cx)).await;
    match end {
        End::Finished => relay.in_order = true,
        End::ClientReset | End::Stopped | End::Evicted | End::GaveWay => {}
        End::Upstream(_) => {
            // What is left after that time the client does not want.
            let _ = timeout(LAST_WORDS, relay.last_words()).await;
        }
    }
    end
}

/// A flow being relayed. Dropped before its end (we stop, or something panics) it resets both sides: an orderly end
/// would make a part look like the whole.
struct Relay<'a, C: Client> {
    client: &'a mut C,
    upstream: &'a mut BoxStream,
    account: &'a mut Account,
    up: Way,
    down: Way,
    /// Something was written to the upstream since it was last flushed.
    unflushed: bool,
    /// Both sides have finished.
    in_order: bool,
}

impl<C: Client> Drop for Relay<'_, C> {
    fn drop(&mut self) {
        if !self.in_order {
            self.upstream.reset();
            self.client.abort();
        }
    }
}

impl<C: Client> Relay<'_, C> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if let Poll::Ready(Err(end)) = self.poll_up(cx) {
            return Poll::Ready(end);
        }
        if let Poll::Ready(Err(end)) = self.poll_down(cx) {
            return Poll::Ready(end);
        }
        if self.up == Way::Done && self.down == Way::Done { Poll::Ready(End::Finished) } else { Poll::Pending }
    }

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        for _ in 0..SHARE {
            if self.up == Way::Open {
                match self.poll_move_up(cx) {
                    Poll::Ready(Ok(0)) => self.up = Way::Finishing,
                    Poll::Ready(Ok(bytes)) => {
                        self.unflushed = true;
                        self.account.moved(bytes as u64, 0);
                        continue;
                    }
                    Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                    Poll::Pending => return self.poll_flush(cx),
                }
            }
            if self.up == Way::Finishing {
                match Pin::new(&mut **self.upstream).poll_shutdown(cx) {
                    Poll::Ready(Ok(())) => self.up = Way::Done,
                    // The upstream may be gone already, which the other direction reports if it matters.
                    Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::NotConnected => self.up = Way::Done,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(End::Upstream(error))),
                    Poll::Pending => return Poll::Pending,
                }
            }
            return Poll::Ready(Ok(()));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        for _ in 0..SHARE {
            if self.down == Way::Open {
                match self.poll_move_down(cx) {
                    Poll::Ready(Ok(0)) => self.down = Way::Finishing,
                    Poll::Ready(Ok(_)) => continue,
                    Poll::Ready(Err(end)) => return Poll::Ready(Err(end)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            if self.down == Way::Finishing {
                match self.client.poll_finish(cx) {
                    Poll::Ready(Ok(())) => self.down = Way::Done,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(End::without_client(&error))),
                    Poll::Pending => return Poll::Pending,
                }
            }
            return Poll::Ready(Ok(()));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Moves once from the client to the upstream; 0 is the end.
    fn poll_move_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, End>> {
        let mut failure = None;
        let upstream = &mut *self.upstream;
        let outcome =
            self.client.poll_recv(cx, &mut |cx, bytes| match Pin::new(&mut **upstream).poll_write(cx, bytes) {
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
        match failure {
            Some(error) => Poll::Ready(Err(End::Upstream(error))),
            None => outcome.map_err(|error| End::without_client(&error)),
        }
    }

    /// Moves once from the upstream to the client; 0 is the end.
    fn poll_move_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<usize, End>> {
        let mut failure = None;
        let upstream = &mut *self.upstream;
        let outcome = self.client.poll_send(cx, &mut |cx, space| {
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
            self.down = Way::Done;
            return Poll::Ready(Err(End::Upstream(error)));
        }
        if let Poll::Ready(Ok(bytes)) = outcome {
            self.account.moved(0, bytes as u64);
        }
        outcome.map_err(|error| End::without_client(&error))
    }

    /// TLS and the like keep a part of what was written until they are told to send it.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        if self.unflushed {
            match Pin::new(&mut **self.upstream).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(End::Upstream(error))),
                Poll::Pending => {}
            }
        }
        Poll::Pending
    }

    /// After the upstream failed: what it has said before may be there to read still (a server that refuses an upload
    /// answers, and closes with a reset), and on its way to the client.
    async fn last_words(&mut self) {
        while self.down == Way::Open {
            match poll_fn(|cx| self.poll_move_down(cx)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => tokio::task::coop::consume_budget().await,
            }
        }
        poll_fn(|cx| self.client.poll_flushed(cx)).await;
    }
}
