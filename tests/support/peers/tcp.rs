//! TCP servers: echo, reset, silence, and the exchange that half-closes.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, copy};
use tokio::net::TcpStream;

use super::digest::{Sha256, pattern};
use super::{Peer, Peers, Record};

impl Peers {
    /// Sends back what it gets, and a FIN for a FIN.
    pub(crate) fn tcp_echo(&self, address: SocketAddr) -> Peer {
        self.tcp(address, async |mut stream, _| {
            let (mut read, mut write) = stream.split();
            copy(&mut read, &mut write).await?;
            write.shutdown().await
        })
    }

    /// Accepts, waits for the first bytes, then resets the connection.
    pub(crate) fn tcp_resetting(&self, address: SocketAddr) -> Peer {
        self.tcp(address, async |mut stream, _| {
            stream.read_u8().await?;
            // Closing with a linger time of zero sends RST and drops what was not sent (RFC 9293, 3.9.1.5 ABORT).
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))
        })
    }

    /// Accepts and resets the connection at once.
    pub(crate) fn tcp_resetting_at_once(&self, address: SocketAddr) -> Peer {
        self.tcp(address, async |stream, _| socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)))
    }

    /// Accepts and never says a word.
    pub(crate) fn tcp_silent(&self, address: SocketAddr) -> Peer {
        self.tcp(address, async |mut stream, _| {
            let mut sink = tokio::io::sink();
            copy(&mut stream, &mut sink).await?;
            std::future::pending().await
        })
    }

    /// Moves bulk data in the direction the client's first line asks for, each side closing its half when done:
    ///
    /// - `up`: reads to the FIN, answers with the SHA-256 of what came;
    /// - `down N`: sends N bytes of the test stream and a FIN, then reads the client's digest until its FIN;
    /// - `both N`: reads to the FIN, *then* answers with the digest, a newline and N bytes.
    ///
    /// Every digest seen by the server is noted in `record` as `up HEX` or `down HEX`.
    pub(crate) fn tcp_exchange(&self, address: SocketAddr, record: &Record) -> Peer {
        let record = record.clone();
        self.tcp(address, move |stream, _| exchange(stream, record.clone()))
    }
}

async fn exchange(mut stream: TcpStream, record: Record) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut read = BufReader::with_capacity(256 << 10, read);
    let mut order = String::new();
    read.read_line(&mut order).await?;
    let (what, length) = order.trim_end().split_once(' ').unwrap_or((order.trim_end(), "0"));
    let length = length.parse().map_err(io::Error::other)?;
    if what == "down" {
        send_pattern(&mut write, length).await?;
        write.shutdown().await?;
        let mut digest = String::new();
        read.read_to_string(&mut digest).await?;
        record.note(format!("down {digest}"));
        return Ok(());
    }
    let mut sha = Sha256::new();
    loop {
        let chunk = read.fill_buf().await?;
        if chunk.is_empty() {
            break;
        }
        sha.update(chunk);
        let taken = chunk.len();
        read.consume(taken);
    }
    let digest = sha.hex();
    record.note(format!("up {digest}"));
    write.write_all(format!("{digest}\n").as_bytes()).await?;
    send_pattern(&mut write, length).await?;
    write.shutdown().await
}

/// Writes the first `length` bytes of the test stream.
pub(crate) async fn send_pattern(to: &mut (impl AsyncWrite + Unpin), length: u64) -> io::Result<()> {
    let mut offset = 0;
    while offset < length {
        let chunk = pattern(offset, length - offset);
        to.write_all(chunk).await?;
        offset += chunk.len() as u64;
    }
    Ok(())
}
