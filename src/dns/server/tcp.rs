//! DNS over TCP (RFC 7766): many queries on one stream, answered in the order in which they are known.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::places::{IsOwn, Places};
use crate::dns::{Answer, Asker, Dns, Question, Transport, now};

/// A stream on which nothing is asked and nothing is owed is closed after this time, and so is one whose client does
/// not take its answers or sends a query by the drop (RFC 7766 section 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);
/// Questions of one stream that may wait for nameservers; then no more are read.
const MAX_WAITING: usize = 64;
/// Answers of one stream that are put together before they are written, in bytes.
const MAX_OUTPUT: usize = 1 << 16;
/// Clients of one listener. One more is closed at once.
const MAX_CLIENTS: usize = 512;
/// Of these, streams of one client.
const MAX_OF_ONE: usize = 64;
/// How long accepting rests when the system has no descriptors left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// Accepts and serves clients until dropped, and them with it.
pub(super) async fn serve(dns: &Arc<Dns>, listener: &TcpListener, is_own: IsOwn) -> io::Result<()> {
    let (mut clients, places) = (JoinSet::new(), Places::new(MAX_OF_ONE, is_own));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) if clients.len() < MAX_CLIENTS => {
                    // The address fails only where the client has gone again.
                    let asked = stream.local_addr().ok();
                    let Some(place) = asked.and_then(|asked| places.enter(client.ip(), asked.ip())) else { continue };
                    // Answers are single small writes; a failure only delays them.
                    let _ = stream.set_nodelay(true);
                    let served = serve_stream(Arc::clone(dns), client.ip().into(), stream, || Some(()));
                    clients.spawn(async move {
                        served.await;
                        drop(place);
                    });
                }
                Ok(_) => {}
                Err(error) if of_one_client(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no DNS client can be accepted over TCP");
                    tokio::time::sleep(EXHAUSTED).await;
                }
            },
            Some(_) = clients.join_next() => {}
        }
    }
}

/// accept(2) also reports what happened to a connection before it was accepted.
fn of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// Answers the queries on one stream of `asker`: an accepted one, or one hijacked from the TUN. Returns when the client has
/// closed it and has its answers, when it breaks, or when it idles. A question that waits for nameservers keeps the place that
/// `enter` gives it meanwhile; one that gets none is refused.
pub async fn serve_stream<P>(
    dns: Arc<Dns>,
    asker: Asker,
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    enter: impl Fn() -> Option<P>,
) {
    // How a client's stream breaks is its own affair.
    let _ = converse(&dns, asker, &mut stream, enter).await;
    let _ = timeout(IDLE, stream.shutdown()).await;
}

async fn converse<P>(
    dns: &Dns,
    asker: Asker,
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    enter: impl Fn() -> Option<P>,
) -> io::Result<()> {
    let mut waiting = FuturesUnordered::new();
    let mut input = Vec::with_capacity(2048);
    let (mut output, mut reply) = (Vec::new(), Vec::new());
    let mut open = true;
    let mut deadline = Instant::now() + IDLE;
    loop {
        let taken =
            take_queries((dns, asker), &input, MAX_WAITING - waiting.len(), &mut reply, &mut output, |question| {
                let Some(place) = enter() else { return Some(dns.refuse(&question)) };
                waiting.push(async move {
                    let answer = dns.ask(question).await;
                    drop(place);
                    answer
                });
                None
            });
        if !output.is_empty() {
            dns.flush();
            timeout(IDLE, stream.write_all(&output)).await??;
            output.clear();
            deadline = Instant::now() + IDLE;
        }
        if taken > 0 {
            input.drain(..taken);
            deadline = Instant::now() + IDLE;
            continue;
        }
        if !open && waiting.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some(answer) = waiting.next() => frame(&answer, &mut output),
            read = stream.read_buf(&mut input), if open && waiting.len() < MAX_WAITING => open = read? > 0,
            () = tokio::time::sleep_until(deadline), if waiting.is_empty() => return Ok(()),
        }
    }
}

/// Answers whole frames at the front of `input` until the output is full or `room` questions wait. `ask` has what refuses one,
/// if it may not wait. Returns how many bytes they were.
fn take_queries(
    (dns, asker): (&Dns, Asker),
    input: &[u8],
    mut room: usize,
    reply: &mut Vec<u8>,
    output: &mut Vec<u8>,
    mut ask: impl FnMut(Question) -> Option<Vec<u8>>,
) -> usize {
    let mut taken = 0;
    while room > 0 && output.len() < MAX_OUTPUT {
        let Some((query, rest)) = first_frame(&input[taken..]) else { break };
        match dns.answer(query, Transport::Tcp, asker, now(), reply) {
            Answer::Ready => frame(reply, output),
            Answer::Ask(question) => match ask(question) {
                Some(refusal) => frame(&refusal, output),
                None => room -= 1,
            },
            Answer::Drop => {}
        }
        taken = input.len() - rest.len();
    }
    taken
}

/// The first message and what follows it, if all of it is there (RFC 1035 section 4.2.2).
fn first_frame(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = input.split_first_chunk()?;
    rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))
}

fn frame(message: &[u8], output: &mut Vec<u8>) {
    // No reply is longer than `Query::limit` of TCP.
    output.extend_from_slice(&(message.len() as u16).to_be_bytes());
    output.extend_from_slice(message);
}
