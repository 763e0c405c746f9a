//! Sites: HTTP and echoes, that tell each visitor which way it came.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::super::requests::{DOWNLOAD, DOWNLOAD_PATH, byte_at};
use super::{accept, whence};

/// Opens the ports of the site at `ip`: 80 HTTP, 2323 echo over TCP, 7 echo over UDP. Every other port is closed.
pub(super) async fn serve(ip: IpAddr) -> io::Result<()> {
    let http = TcpListener::bind((ip, 80)).await?;
    tokio::spawn(accept(http, answer));
    let echo = TcpListener::bind((ip, 2323)).await?;
    tokio::spawn(accept(echo, repeat));
    let datagrams = UdpSocket::bind((ip, 7)).await?;
    tokio::spawn(repeat_datagrams(datagrams));
    Ok(())
}

async fn answer(stream: TcpStream, from: SocketAddr) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    let mut line = String::new();
    // The first line names the path; an empty one ends the head.
    while stream.read_line(&mut line).await? > 2 && request.len() < 16 << 10 {
        request.push_str(&line);
        line.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or("/");
    if path == DOWNLOAD_PATH {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {DOWNLOAD}\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let body: Vec<u8> = (0..DOWNLOAD).map(byte_at).collect();
        stream.write_all(&body).await?;
    } else {
        let body = whence(from.ip());
        let length = body.len();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
        stream.write_all(head.as_bytes()).await?;
    }
    stream.shutdown().await
}

/// Sends back what comes until the visitor has finished, and only then how it came: half-close at work.
async fn repeat(mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
    let mut said = Vec::new();
    (&mut stream).take(1 << 20).read_to_end(&mut said).await?;
    stream.write_all(&said).await?;
    stream.write_all(whence(from.ip()).as_bytes()).await?;
    stream.shutdown().await
}

async fn repeat_datagrams(socket: UdpSocket) {
    let mut buffer = vec![0; 2048];
    loop {
        // An ICMP error of an earlier answer may come up here; it is nobody's loss.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let answer = [&buffer[..length], whence(from.ip()).as_bytes()].concat();
        let _ = socket.send_to(&answer, from).await;
    }
}
