//! A dispatcher of the tests' own, and a port in front of it.

use std::cell::RefCell;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{LocalSet, spawn_local};

use super::{Access, Drops, Listener, User, serve};
use crate::dispatch::{Back, Entry};
use crate::net::{BoxStream, DialError};
use crate::session::{Inbound, Session};

/// Where every flow of a test goes.
pub(super) enum Goal {
    /// To this server.
    Server(SocketAddr),
    /// Nowhere, for this reason.
    Fails(fn() -> DialError),
    /// The dial never ends.
    Hangs,
}

/// Notes what it is asked for.
#[derive(Clone)]
pub(super) struct Recorder(Rc<Record>);

pub(super) struct Record {
    goal: Goal,
    pub(super) sessions: RefCell<Vec<Session>>,
    pub(super) backs: RefCell<Vec<Rc<dyn Back>>>,
    /// Clients that are gone.
    pub(super) left: RefCell<Vec<SocketAddr>>,
    /// A dial was begun; a dial was given up.
    pub(super) begun: Notify,
    pub(super) given_up: Notify,
    /// A flow was copied to its end.
    pub(super) relayed: Notify,
}

impl std::ops::Deref for Recorder {
    type Target = Record;

    fn deref(&self) -> &Record {
        &self.0
    }
}

impl Recorder {
    pub(super) fn new(goal: Goal) -> Self {
        Self(Rc::new(Record {
            goal,
            sessions: RefCell::default(),
            backs: RefCell::default(),
            left: RefCell::default(),
            begun: Notify::new(),
            given_up: Notify::new(),
            relayed: Notify::new(),
        }))
    }

    pub(super) fn destinations(&self) -> Vec<String> {
        self.sessions.borrow().iter().map(|session| session.destination.to_string()).collect()
    }
}

/// Tells when a future that holds it is dropped.
struct GivenUp<'a>(&'a Notify);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Entry for Recorder {
    type Upstream = BoxStream;

    async fn dial(&self, session: Session) -> Result<BoxStream, DialError> {
        self.sessions.borrow_mut().push(session);
        self.begun.notify_one();
        match self.goal {
            Goal::Server(server) => Ok(Box::new(TcpStream::connect(server).await?)),
            Goal::Fails(why) => Err(why()),
            Goal::Hangs => {
                let _noticed = GivenUp(&self.given_up);
                std::future::pending().await
            }
        }
    }

    async fn relay(&self, mut upstream: BoxStream, mut client: BoxStream) {
        if copy_bidirectional(&mut upstream, &mut client).await.is_err() {
            client.reset();
        }
        self.relayed.notify_one();
    }

    /// Answers every datagram with itself, from the peer it was sent to.
    fn datagram(&self, session: Session, payload: &[u8], _: bool, back: &Rc<dyn Back>) {
        back.deliver(&session.destination, session.source, payload);
        self.sessions.borrow_mut().push(session);
        self.backs.borrow_mut().push(Rc::clone(back));
    }

    fn leave(&self, source: SocketAddr, _: &Rc<dyn Back>) {
        self.left.borrow_mut().push(source);
    }
}

/// Runs a test where tasks may be local.
pub(super) async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

/// A port that serves for as long as the test runs.
pub(super) fn open(inbound: Inbound, access: Access, entry: &Recorder) -> (SocketAddr, Arc<Drops>) {
    let listener = Listener::bind(inbound, 0, Arc::new(access)).unwrap();
    let (address, drops) = (listener.addresses()[0], listener.drops());
    let entry = entry.clone();
    spawn_local(listener.run(move |accepted| {
        spawn_local(serve(accepted, entry.clone()));
    }));
    (address, drops)
}

/// An access that asks everybody for a password.
pub(super) fn guarded() -> Access {
    Access { users: vec![User::new("me", "secret")], ..Access::default() }
}

/// A server that answers, when the client is done, with what it said, in capitals.
pub(super) async fn shouting() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut said = Vec::new();
                stream.read_to_end(&mut said).await.unwrap();
                stream.write_all(&said.to_ascii_uppercase()).await.unwrap();
            });
        }
    });
    address
}

/// Reads a message's head, up to the empty line.
pub(super) async fn head(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}
