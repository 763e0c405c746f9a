//! Requests in absolute form: each goes on to its server, over the last upstream if that is the same server.

use std::io;

use http_body_util::Either;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::task::AbortHandle;

use super::pipe::pipe;
use super::{Body, Front, Then, refuse, say};
use crate::dispatch::Entry;
use crate::net::{Address, DialError};

/// Headers that speak of one connection only (RFC 9110 section 7.6.1). TE and Trailer go too: trailers are not passed.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// An upstream that can take another request.
pub(super) struct Kept {
    to: Address,
    sender: SendRequest<Incoming>,
    carrier: Carrier,
}

/// The task that speaks HTTP with the upstream; dropped, it ends. By itself it would go on for as long as an upstream
/// that takes nothing has not taken what a client who left has sent.
struct Carrier(Option<AbortHandle>);

impl Carrier {
    /// Lets the task end by itself.
    fn let_go(mut self) {
        self.0 = None;
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl<E: Entry> Front<E> {
    /// Passes `request` on to the server `to`, and its answer back.
    pub(super) async fn forward(&self, request: Request<Incoming>, to: Address) -> io::Result<Response<Body>> {
        let mut request = request;
        let switch = request.headers().get(header::UPGRADE).cloned();
        // Asked of the request before its parts change.
        let client = switch.is_some().then(|| hyper::upgrade::on(&mut request));
        if rewrite(&mut request, switch).is_none() {
            return Ok(say(StatusCode::BAD_REQUEST, "the request's address cannot be read"));
        }
        let kept = self.kept.take().filter(|kept| kept.to == to);
        let mut request = request;
        if let Some(mut kept) = kept
            && kept.sender.ready().await.is_ok()
        {
            match kept.sender.try_send_request(request).await {
                Ok(response) => return Ok(self.finish(response, client, kept)),
                // The server closed the idle connection first: nothing was sent, so another may carry it.
                Err(mut failed) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Ok(broken(&to, &failed.into_error())),
                },
            }
        }
        let mut kept = match self.open(&to).await {
            Ok((sender, carrier)) => Kept { to, sender, carrier },
            Err(error) => return refuse(&to, &error).await,
        };
        match kept.sender.send_request(request).await {
            Ok(response) => Ok(self.finish(response, client, kept)),
            Err(error) => Ok(broken(&kept.to, &error)),
        }
    }

    /// Dials, and speaks HTTP over a pipe whose other end is relayed as any flow is, counted and logged.
    async fn open(&self, to: &Address) -> Result<(SendRequest<Incoming>, Carrier), DialError> {
        let upstream = self.dial(to).await?;
        let (ours, theirs) = pipe();
        let entry = self.entry.clone();
        tokio::task::spawn_local(async move { entry.relay(upstream, Box::new(theirs)).await });
        let (sender, connection) = http1::Builder::new()
            .preserve_header_case(true)
            .max_buf_size(super::MAX_HEAD)
            .handshake(TokioIo::new(ours))
            .await
            .map_err(|error| DialError::Io(io::Error::other(error)))?;
        let task = tokio::task::spawn_local(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!("an upstream's HTTP connection failed: {error}");
            }
        });
        Ok((sender, Carrier(Some(task.abort_handle()))))
    }

    /// The answer for the client; the upstream is kept for the next request.
    fn finish(
        &self,
        mut response: Response<Incoming>,
        client: Option<hyper::upgrade::OnUpgrade>,
        kept: Kept,
    ) -> Response<Body> {
        match (response.status(), client) {
            (StatusCode::SWITCHING_PROTOCOLS, Some(client)) => {
                kept.carrier.let_go();
                let switch = response.headers().get(header::UPGRADE).cloned();
                *self.then.borrow_mut() = Some(Then::Switch(client, hyper::upgrade::on(&mut response)));
                strip(response.headers_mut());
                keep_upgrade(response.headers_mut(), switch);
            }
            _ => {
                strip(response.headers_mut());
                *self.kept.borrow_mut() = Some(kept);
            }
        }
        *response.version_mut() = Version::HTTP_11;
        response.map(Either::Left)
    }
}

fn broken(to: &Address, error: &hyper::Error) -> Response<Body> {
    say(StatusCode::BAD_GATEWAY, &format!("{to}: the server broke off: {error}"))
}

/// The request as the server is to see it: origin form, Host from the address (RFC 9112 section 3.2.2), nothing that
/// was meant for us. None: the address cannot be written in origin form.
fn rewrite(request: &mut Request<Incoming>, switch: Option<HeaderValue>) -> Option<()> {
    let authority = request.uri().authority()?.as_str();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = HeaderValue::from_str(host).ok()?;
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    let path = if path.starts_with('/') { path.parse() } else { format!("/{path}").parse() };
    let path: Uri = path.ok()?;
    let chunked = !request.body().is_end_stream() && request.body().size_hint().exact().is_none();
    *request.uri_mut() = path;
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    strip(headers);
    headers.insert(header::HOST, host);
    keep_upgrade(headers, switch);
    if chunked {
        // Said aloud, as hyper would otherwise take a GET to have no body; a length beside it would be a lie.
        headers.remove(header::CONTENT_LENGTH);
        headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    Some(())
}

/// Puts back what asks for, or grants, another protocol.
fn keep_upgrade(headers: &mut HeaderMap, switch: Option<HeaderValue>) {
    if let Some(protocol) = switch {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// Removes what speaks of this connection only: the headers that Connection names, and those that always do.
fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        // A client that names these would break the message's framing, not a header of its own.
        .filter(|name| *name != header::CONTENT_LENGTH && *name != header::HOST)
        .collect();
    for name in named.into_iter().chain(HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_speaks_of_the_connection_is_removed() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("connection", "content-length"),
            ("x-hop", "1"),
            ("x-end", "2"),
            ("content-length", "3"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic x"),
            ("proxy-connection", "keep-alive"),
            ("authorization", "Basic y"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip(&mut headers);
        let mut left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "content-length", "x-end"]);
    }
}
