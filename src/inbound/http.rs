//! HTTP for clients: CONNECT, and requests in absolute form that are passed on (RFC 9110, RFC 9112).

mod forward;
mod pipe;

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use hyper::header::{HeaderValue, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::copy_bidirectional;
use tokio::net::TcpStream;
use tokio::time::sleep;

use self::forward::Kept;
use super::mixed::{Client, Facts, HANDSHAKE, SILENCE};
use super::refusal::Refusal;
use crate::dispatch::Entry;
use crate::net::{Address, BoxFuture, BoxStream, DialError, Host, Stream as _};
use crate::outbound::Prefixed;
use crate::session::Network;

/// The most bytes of a request's head.
const MAX_HEAD: usize = 64 * 1024;

/// How long a connection may wait for its next request.
const IDLE: Duration = Duration::from_secs(60);

/// A body that is passed on, or one of our own.
type Body = Either<Incoming, Full<Bytes>>;

/// One client connection.
struct Front<E: Entry> {
    entry: E,
    facts: Facts,
    /// Whether a whole request has come.
    spoke: Cell<bool>,
    /// The upstream of the last request, for the next one.
    kept: RefCell<Option<Kept>>,
    /// What the connection becomes after its last answer.
    then: RefCell<Option<Then<E>>>,
}

/// What follows HTTP on a connection.
enum Then<E: Entry> {
    /// CONNECT was granted: bytes go both ways.
    Tunnel(OnUpgrade, E::Upstream),
    /// The server switched protocols (101): what both sides say goes to the other.
    Switch(OnUpgrade, OnUpgrade),
}

/// Serves one client.
///
/// # Errors
/// It broke the protocol or the connection.
pub(super) async fn serve<E: Entry>(client: Client, entry: E) -> io::Result<()> {
    let Client { stream, facts } = client;
    // While a request waits for its upstream, nothing is read that would tell.
    let gone = stream.broken();
    let front =
        Rc::new(Front { entry, facts, spoke: Cell::new(false), kept: RefCell::default(), then: RefCell::new(None) });
    let service = service_fn(|request| {
        let front = Rc::clone(&front);
        async move { front.answer(request).await }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .max_buf_size(MAX_HEAD)
        .preserve_header_case(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let whole = async {
        tokio::select! {
            ended = connection.as_mut() => return ended.map_err(io::Error::other),
            () = sleep(HANDSHAKE) => {}
        }
        if !front.spoke.get() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        connection.await.map_err(io::Error::other)
    };
    tokio::select! {
        ended = whole => ended?,
        () = until(gone) => return Err(io::ErrorKind::ConnectionReset.into()),
    }
    // A statement of its own: nothing stays borrowed while the tunnel lives.
    let then = front.then.take();
    match then {
        Some(Then::Tunnel(client, upstream)) => {
            let client = client.await.map_err(io::Error::other)?;
            front.entry.relay(upstream, as_stream(client)?).await;
        }
        Some(Then::Switch(client, server)) => {
            let (client, server) = (client.await.map_err(io::Error::other)?, server.await.map_err(io::Error::other)?);
            copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await?;
        }
        None => {}
    }
    Ok(())
}

/// Waits for what is there to be waited for, else for ever.
async fn until(event: Option<BoxFuture<'static, ()>>) {
    match event {
        Some(event) => event.await,
        None => std::future::pending().await,
    }
}

/// The client's own socket, and in front what hyper had read too much.
fn as_stream(upgraded: Upgraded) -> io::Result<BoxStream> {
    let parts = upgraded.downcast::<TokioIo<TcpStream>>().map_err(|_| io::Error::other("not the socket we gave"))?;
    Ok(Prefixed::boxed(parts.read_buf, parts.io.into_inner()))
}

impl<E: Entry> Front<E> {
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        self.spoke.set(true);
        if self.facts.asks() && !self.is_known(&request) {
            let mut answer = say(StatusCode::PROXY_AUTHENTICATION_REQUIRED, "this proxy wants a user and a password");
            answer.headers_mut().insert(PROXY_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"tunproxy\""));
            return Ok(answer);
        }
        if request.method() == Method::CONNECT {
            return self.connect(request).await;
        }
        match (request.uri().scheme_str(), destination(request.uri(), Some(80))) {
            (Some("http"), Some(to)) => self.forward(request, to).await,
            (Some("https"), _) => Ok(say(StatusCode::BAD_REQUEST, "https through a proxy needs CONNECT")),
            (None, _) => Ok(say(StatusCode::BAD_REQUEST, "this is a proxy: the request must name the whole address")),
            _ => Ok(say(StatusCode::BAD_REQUEST, "this proxy does not know that kind of address")),
        }
    }

    fn is_known(&self, request: &Request<Incoming>) -> bool {
        let Some(value) = request.headers().get(PROXY_AUTHORIZATION).and_then(|value| value.to_str().ok()) else {
            return false;
        };
        value
            .split_once(' ')
            .is_some_and(|(scheme, given)| scheme.eq_ignore_ascii_case("basic") && self.facts.access.knows_basic(given))
    }

    async fn connect(&self, mut request: Request<Incoming>) -> io::Result<Response<Body>> {
        let Some(to) = destination(request.uri(), None) else {
            return Ok(say(StatusCode::BAD_REQUEST, "CONNECT needs a host and a port"));
        };
        match self.dial(&to).await {
            Ok(upstream) => {
                *self.then.borrow_mut() = Some(Then::Tunnel(hyper::upgrade::on(&mut request), upstream));
                Ok(Response::new(Either::Right(Full::default())))
            }
            Err(error) => refuse(&to, &error).await,
        }
    }

    async fn dial(&self, to: &Address) -> Result<E::Upstream, DialError> {
        self.entry.dial(self.facts.session(Network::Tcp, self.facts.peer, to.clone())).await
    }
}

/// Where a request goes; None if it does not say so.
fn destination(uri: &Uri, default: Option<u16>) -> Option<Address> {
    let authority = uri.authority()?;
    let port = match authority.port_u16() {
        Some(port) => port,
        // What follows the host and is no number is not the default port.
        None if authority.as_str().ends_with(authority.host()) => default?,
        None => return None,
    };
    Some(Address { host: Host::parse(authority.host()).ok()?, port })
}

/// One line that says why.
fn say(status: StatusCode, words: &str) -> Response<Body> {
    let mut response = Response::new(Either::Right(Full::from(format!("tunproxy: {words}\n"))));
    *response.status_mut() = status;
    response
}

/// A failed dial. An error closes the connection without a word.
async fn refuse(to: &Address, error: &DialError) -> io::Result<Response<Body>> {
    let Some(status) = Refusal::from(error).http() else {
        sleep(SILENCE).await;
        return Err(io::ErrorKind::TimedOut.into());
    };
    Ok(say(status, &format!("{to}: {error}")))
}

#[cfg(test)]
mod tests;
