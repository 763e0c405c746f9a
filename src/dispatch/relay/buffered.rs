//! A client that is a stream itself (the proxy inbounds), with a buffer for each direction.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::ReadBuf;
use tokio::time::{Sleep, sleep};

use super::{Client, Read, Write};
use crate::net::{BoxFuture, BoxStream, Stream};

/// How long to wait between looks at what the client has not acknowledged yet: at first, and at most.
const LOOK: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(500)];

/// A stream with what it needs to lend its bytes.
pub(crate) struct Buffered {
    stream: BoxStream,
    up: Buffer,
    down: Buffer,
    /// The client has finished sending.
    ended: bool,
    /// Ready when the client resets; made when nothing else would tell.
    broken: Option<BoxFuture<'static, ()>>,
    pause: Option<(Pin<Box<Sleep>>, Duration)>,
}

struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Buffer {
    fn new(size: usize) -> Self {
        Self { bytes: vec![0; size].into_boxed_slice(), start: 0, end: 0 }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn filled(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Room behind what is there, which moves to the front for it.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        &mut self.bytes[self.end..]
    }
}

impl Buffered {
    /// With two buffers of `size` bytes.
    pub(crate) fn new(stream: BoxStream, size: usize) -> Self {
        Self { stream, up: Buffer::new(size), down: Buffer::new(size), ended: false, broken: None, pause: None }
    }

    /// Reads once into the room that is left for the upload. Ready with false: there is none, or nothing more comes.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let room = self.up.room();
        if self.ended || room.is_empty() {
            return Poll::Ready(Ok(false));
        }
        let mut buffer = ReadBuf::new(room);
        ready!(Pin::new(&mut *self.stream).poll_read(cx, &mut buffer))?;
        let read = buffer.filled().len();
        self.up.end += read;
        self.ended = read == 0;
        Poll::Ready(Ok(!self.ended))
    }

    /// Ready when the client has reset the connection, which it may while nobody reads from it.
    fn poll_broken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.broken.is_none() {
            self.broken = self.stream.broken();
        }
        self.broken.as_mut().map_or(Poll::Pending, |broken| broken.as_mut().poll(cx))
    }

    /// While the upstream takes nothing: reads ahead, and then listens for a reset.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        loop {
            match ready!(self.poll_fill(cx)) {
                Ok(true) => {}
                Ok(false) => return self.poll_broken(cx).map(|()| io::ErrorKind::ConnectionReset.into()),
                Err(error) => return Poll::Ready(error),
            }
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.down.is_empty() {
            match ready!(Pin::new(&mut *self.stream).poll_write(cx, self.down.filled()))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.down.start += written,
            }
        }
        Pin::new(&mut *self.stream).poll_flush(cx)
    }
}

impl Client for Buffered {
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>> {
        if self.up.is_empty() && !ready!(self.poll_fill(cx))? {
            return Poll::Ready(Ok(0));
        }
        let outcome = read(cx, self.up.filled());
        match outcome {
            Poll::Ready(Ok(taken)) => {
                self.up.start += taken;
                // It costs a descriptor, and reading tells now.
                self.broken = None;
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending => return self.poll_ahead(cx).map(Err),
        }
        outcome
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(cx))?;
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
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }

    fn poll_flushed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if ready!(self.poll_drain(cx)).is_err() || self.stream.unacknowledged() == 0 {
                return Poll::Ready(());
            }
            if self.poll_broken(cx).is_ready() {
                return Poll::Ready(());
            }
            let [first, most] = LOOK;
            let (pause, length) = self.pause.get_or_insert_with(|| (Box::pin(sleep(first)), first));
            ready!(pause.as_mut().poll(cx));
            *length = (*length * 2).min(most);
            *pause = Box::pin(sleep(*length));
        }
    }

    fn abort(&mut self) {
        self.stream.reset();
    }
}
