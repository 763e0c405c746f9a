//! Two ends of a byte stream within the process, on which a reset is told from an orderly end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, duplex};
use tokio::sync::watch;

use crate::net::{BoxFuture, Stream};

/// Bytes that may be on the way in each direction.
const ROOM: usize = 64 * 1024;

/// One end.
pub(super) struct Pipe {
    inner: DuplexStream,
    /// Set by whichever end resets; then the end of the stream is an error for the other.
    reset: Arc<AtomicBool>,
    /// Ends with this end.
    _here: watch::Sender<()>,
    /// Ends with the other end.
    there: watch::Receiver<()>,
}

/// Both ends.
pub(super) fn pipe() -> (Pipe, Pipe) {
    let (one, other) = duplex(ROOM);
    let reset = Arc::new(AtomicBool::new(false));
    let ((one_here, one_seen), (other_here, other_seen)) = (watch::channel(()), watch::channel(()));
    (
        Pipe { inner: one, reset: Arc::clone(&reset), _here: one_here, there: other_seen },
        Pipe { inner: other, reset, _here: other_here, there: one_seen },
    )
}

impl Stream for Pipe {
    fn reset(&mut self) {
        self.reset.store(true, Ordering::Release);
    }

    /// Whoever dropped the other end waits for no answer, whatever it shut down before.
    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        let mut there = self.there.clone();
        Some(Box::pin(async move { while there.changed().await.is_ok() {} }))
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        let ended = buffer.filled().len() == before && buffer.remaining() > 0;
        if ended && self.reset.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn who_neither_reads_nor_writes_hears_that_the_other_end_is_gone() {
        let (mut one, other) = pipe();
        let mut broken = other.broken().unwrap();
        one.write_all(b"unread").await.unwrap();
        tokio::select! {
            biased;
            () = &mut broken => panic!("the other end is there"),
            () = std::future::ready(()) => {}
        }
        drop(one);
        broken.await;
    }

    #[tokio::test]
    async fn an_end_is_an_end_and_a_reset_is_an_error_after_the_last_byte() {
        for reset in [false, true] {
            let (mut one, mut other) = pipe();
            one.write_all(b"last words").await.unwrap();
            if reset {
                one.reset();
            }
            drop(one);
            let mut heard = Vec::new();
            let outcome = other.read_to_end(&mut heard).await;
            assert_eq!(heard, b"last words");
            assert_eq!(outcome.map_err(|error| error.kind()).err(), reset.then_some(io::ErrorKind::ConnectionReset));
        }
    }
}
