use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Wake, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::dispatch::Counters;
use crate::session::{Inbound, Network, Session};

fn account() -> Account {
    let client = "192.0.2.1:1000".parse().unwrap();
    let server = "198.51.100.1:80".parse::<std::net::SocketAddr>().unwrap();
    let session = Session::new(Network::Tcp, Inbound::Tun, client, server.into());
    Account::new(Arc::new(Counters::default()), session, None)
}

/// What an upstream does when it is read from.
enum Says {
    Bytes(&'static [u8]),
    /// The same for ever.
    Endless,
    Fails(io::ErrorKind),
    Nothing,
}

/// An upstream by script.
struct Script {
    says: VecDeque<Says>,
    /// What a write gets; None waits for ever.
    write: Option<io::Result<usize>>,
    reset: Arc<Mutex<bool>>,
}

impl Script {
    fn boxed(says: impl IntoIterator<Item = Says>, write: Option<io::Result<usize>>) -> (BoxStream, Arc<Mutex<bool>>) {
        let reset = Arc::new(Mutex::new(false));
        (Box::new(Self { says: says.into_iter().collect(), write, reset: Arc::clone(&reset) }), reset)
    }
}

impl Stream for Script {
    fn reset(&mut self) {
        *self.reset.lock() = true;
    }
}

impl AsyncRead for Script {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.says.pop_front() {
            None => Poll::Ready(Ok(())),
            Some(Says::Bytes(bytes)) => {
                buffer.put_slice(bytes);
                Poll::Ready(Ok(()))
            }
            Some(Says::Endless) => {
                self.says.push_front(Says::Endless);
                buffer.put_slice(&[7; 100]);
                Poll::Ready(Ok(()))
            }
            Some(Says::Fails(kind)) => Poll::Ready(Err(kind.into())),
            Some(Says::Nothing) => {
                self.says.push_front(Says::Nothing);
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Script {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        match self.write.take() {
            None => Poll::Pending,
            Some(outcome) => Poll::Ready(outcome),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A client that notes what is done to it, in order.
#[derive(Default)]
struct Noted {
    events: Rc<RefCell<Vec<String>>>,
    /// Bytes that it offers once.
    offers: &'static [u8],
}

impl Noted {
    fn new(offers: &'static [u8]) -> (Self, Rc<RefCell<Vec<String>>>) {
        let noted = Self { offers, ..Self::default() };
        let events = Rc::clone(&noted.events);
        (noted, events)
    }

    fn note(&self, event: impl Into<String>) {
        self.events.borrow_mut().push(event.into());
    }
}

impl Client for Noted {
    fn poll_recv(&mut self, cx: &mut Context<'_>, read: Read<'_>) -> Poll<io::Result<usize>> {
        if self.offers.is_empty() {
            return Poll::Pending;
        }
        let outcome = read(cx, self.offers);
        if let Poll::Ready(Ok(taken)) = outcome {
            self.offers = &self.offers[taken..];
        }
        outcome
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, write: Write<'_>) -> Poll<io::Result<usize>> {
        let mut space = [0; 1000];
        let outcome = write(cx, &mut space);
        if let Poll::Ready(Ok(put @ 1..)) = outcome {
            self.note(String::from_utf8_lossy(&space[..put]));
        }
        outcome
    }

    fn poll_finish(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.note("FIN");
        Poll::Ready(Ok(()))
    }

    fn poll_flushed(&mut self, _: &mut Context<'_>) -> Poll<()> {
        self.note("flushed");
        Poll::Ready(())
    }

    fn abort(&mut self) {
        self.note("RST");
    }
}

/// Counts how often it is woken.
#[derive(Default)]
struct Count(AtomicUsize);

impl Wake for Count {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_bulk_flow_yields_after_its_share_and_asks_for_another_turn() {
    let (mut client, events) = Noted::new(b"");
    let (mut upstream, _) = Script::boxed([Says::Endless], None);
    let mut account = account();
    let mut task = Box::pin(relay(&mut client, &mut upstream, &mut account));
    let count = Arc::new(Count::default());
    let waker = Waker::from(Arc::clone(&count));
    for turn in 1..4 {
        assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert_eq!((events.borrow().len(), count.0.load(SeqCst)), (turn * SHARE, turn));
    }
}

#[tokio::test]
async fn an_answer_that_came_before_the_upload_failed_reaches_the_client_before_the_reset() {
    let (mut client, events) = Noted::new(b"a large upload");
    let failure = Some(Err(io::ErrorKind::ConnectionReset.into()));
    let (mut upstream, reset) = Script::boxed([Says::Bytes(b"413 "), Says::Bytes(b"too large")], failure);
    let end = relay(&mut client, &mut upstream, &mut account()).await;
    assert!(matches!(end, End::Upstream(_)), "{end}");
    assert_eq!(*events.borrow(), ["413 ", "too large", "flushed", "RST"]);
    assert!(*reset.lock());
}

#[tokio::test]
async fn a_download_that_breaks_off_arrives_as_far_as_it_came_and_does_not_look_complete() {
    let (mut client, events) = Noted::new(b"");
    let says = [Says::Bytes(b"nearly all"), Says::Fails(io::ErrorKind::UnexpectedEof)];
    let (mut upstream, _) = Script::boxed(says, None);
    let mut account = account();
    let end = relay(&mut client, &mut upstream, &mut account).await;
    assert!(matches!(end, End::Upstream(_)), "{end}");
    assert_eq!(*events.borrow(), ["nearly all", "flushed", "RST"]);
    assert_eq!(account.bytes(), (0, 10));
}

#[tokio::test(start_paused = true)]
async fn an_upstream_that_takes_nothing_any_more_and_never_ends_is_not_waited_for_for_ever() {
    let (mut client, events) = Noted::new(b"x");
    let failure = Some(Err(io::ErrorKind::BrokenPipe.into()));
    let (mut upstream, _) = Script::boxed([Says::Bytes(b"half"), Says::Nothing], failure);
    relay(&mut client, &mut upstream, &mut account()).await;
    assert_eq!(*events.borrow(), ["half", "RST"]);
}

#[tokio::test]
async fn a_relay_that_is_given_up_resets_both_sides() {
    let (mut client, events) = Noted::new(b"");
    let (mut upstream, reset) = Script::boxed([Says::Bytes(b"half"), Says::Nothing], None);
    let mut account = account();
    let mut task = Box::pin(relay(&mut client, &mut upstream, &mut account));
    assert!(futures_util::poll!(task.as_mut()).is_pending());
    drop(task);
    assert_eq!(*events.borrow(), ["half", "RST"]);
    assert!(*reset.lock());
}

#[tokio::test]
async fn a_relay_that_ends_in_order_resets_nobody() {
    let (mut client, mut there) = pair().await;
    let (mut upstream, reset) = Script::boxed([Says::Bytes(b"all of it")], None);
    there.shutdown().await.unwrap();
    let end = relay(&mut client, &mut upstream, &mut account()).await;
    assert!(matches!(end, End::Finished), "{end}");
    assert!(!*reset.lock());
    drop(client);
    let mut heard = Vec::new();
    there.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"all of it");
}

/// A client of a proxy port, and its own end.
async fn pair() -> (Buffered, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (here, _) = listener.accept().await.unwrap();
    (Buffered::new(Box::new(here), 64 << 10), there)
}

#[tokio::test(start_paused = true)]
async fn a_clients_reset_is_noticed_while_its_upstream_takes_nothing() {
    // As much as any buffer on the way; and so little that there is room to read on.
    for bytes in [16 << 20, 10] {
        let (mut client, mut there) = pair().await;
        let (mut upstream, reset) = Script::boxed([Says::Nothing], None);
        let mut account = account();
        let upload = async {
            let body = vec![7; bytes];
            let mut sent = 0;
            while sent < bytes {
                // Until nothing has gone out for a while: every buffer is full.
                let step = there.write(&body[sent..]);
                match tokio::time::timeout(Duration::from_millis(200), step).await {
                    Ok(written) => sent += written.unwrap(),
                    Err(_) => break,
                }
            }
            there.reset();
            drop(there);
        };
        let (end, ()) = tokio::join!(relay(&mut client, &mut upstream, &mut account), upload);
        assert!(matches!(end, End::ClientReset), "{end}");
        assert!(*reset.lock());
    }
}

#[tokio::test]
async fn what_was_read_ahead_goes_up_before_the_end() {
    let (mut client, mut there) = pair().await;
    there.write_all(b"first").await.unwrap();
    let mut taken = Vec::new();
    let mut stalled = true;
    // The first look takes nothing; by the next one the client has said the rest.
    poll_fn(|cx| {
        let looked = client.poll_recv(cx, &mut |_, _| Poll::Pending);
        assert!(looked.is_pending());
        Poll::Ready(())
    })
    .await;
    there.write_all(b", second").await.unwrap();
    there.shutdown().await.unwrap();
    loop {
        let step = poll_fn(|cx| {
            client.poll_recv(cx, &mut |cx, bytes| {
                if std::mem::take(&mut stalled) {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                let take = bytes.len().min(3);
                taken.extend_from_slice(&bytes[..take]);
                Poll::Ready(Ok(take))
            })
        });
        if step.await.unwrap() == 0 {
            break;
        }
    }
    assert_eq!(taken, b"first, second");
}

#[tokio::test]
async fn a_proxy_ports_client_gets_all_that_came_before_its_upstream_failed() {
    let (mut client, mut there) = pair().await;
    let says = (0..100).map(|_| Says::Bytes(&[9; 50_000])).chain([Says::Fails(io::ErrorKind::ConnectionReset)]);
    let (mut upstream, _) = Script::boxed(says, None);
    let carried = async {
        let end = relay(&mut client, &mut upstream, &mut account()).await;
        drop(client);
        end
    };
    let mut heard = Vec::new();
    let (end, read) = tokio::join!(carried, there.read_to_end(&mut heard));
    assert!(matches!(end, End::Upstream(_)), "{end}");
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(heard.len(), 100 * 50_000);
}
