//! A stream with bytes in front that were read too early.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::net::{BoxFuture, BoxStream, Stream};

/// Gives out `prefix` before it reads from the stream within.
pub struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
}

impl<S: Stream + 'static> Prefixed<S> {
    /// The stream itself if there is nothing to put in front.
    pub fn boxed(prefix: Bytes, inner: S) -> BoxStream {
        if prefix.is_empty() { Box::new(inner) } else { Box::new(Self { prefix, inner }) }
    }
}

impl<S: Stream> Stream for Prefixed<S> {
    fn reset(&mut self) {
        self.inner.reset();
    }

    fn broken(&self) -> Option<BoxFuture<'static, ()>> {
        self.inner.broken()
    }

    fn unacknowledged(&self) -> usize {
        self.inner.unacknowledged()
    }
}

impl<S: Stream> AsyncRead for Prefixed<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buffer);
        }
        let length = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix[..length]);
        self.prefix.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl<S: Stream> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}
