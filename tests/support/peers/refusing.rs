//! Proxies that reach nothing, and say why in the words of their protocol.

use std::net::SocketAddr;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::{Peer, Peers};

impl Peers {
    /// A SOCKS5 server that answers every request with `code` (RFC 1928, section 6).
    pub(crate) fn socks5_refusing(&self, address: SocketAddr, code: u8) -> Peer {
        self.tcp(address, move |mut stream, _| async move {
            let mut head = [0; 2];
            stream.read_exact(&mut head).await?;
            stream.read_exact(&mut vec![0; usize::from(head[1])]).await?;
            stream.write_all(&[5, 0]).await?;
            // The rest of the request may be of any length: one look is enough to know that it has come.
            stream.read_u8().await?;
            stream.write_all(&[5, code, 0, 1, 0, 0, 0, 0, 0, 0]).await?;
            drain(stream).await
        })
    }

    /// An HTTP proxy that answers every request with `status`.
    pub(crate) fn http_refusing(&self, address: SocketAddr, status: u16) -> Peer {
        self.tcp(address, move |stream, _| async move {
            let mut stream = BufReader::new(stream);
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                if stream.read_until(b'\n', &mut head).await? == 0 {
                    return Ok(());
                }
            }
            let answer = format!("HTTP/1.1 {status} As Told\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await?;
            drain(stream.into_inner()).await
        })
    }
}

/// Closing on unread bytes would reset the connection, and might overtake the answer.
async fn drain(mut stream: tokio::net::TcpStream) -> std::io::Result<()> {
    stream.shutdown().await?;
    tokio::io::copy(&mut stream, &mut tokio::io::sink()).await.map(drop)
}
