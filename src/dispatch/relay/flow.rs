//! A flow of the TUN as a client: it lends its rings.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Client, Read, Write};
use crate::stack::{FlowStream, Heartbeat};

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

    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        FlowStream::poll_flushed(self, cx)
    }

    fn abort(&mut self) {
        FlowStream::abort(self);
    }

    fn watch(&mut self, heartbeat: Arc<Heartbeat>) {
        FlowStream::watch(self, heartbeat);
    }
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
