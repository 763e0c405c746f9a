//! DNS over TCP to hijacked addresses: accepted at once, since no dial can say no, and therefore limited here.

use std::future::poll_fn;
use std::net::IpAddr;
use std::rc::Rc;

use super::places::Places;
use crate::dispatch::Dispatcher;
use crate::dns::Asker;
use crate::stack::FlowStream;

/// Streams of one worker on which questions may be asked; one more is reset.
const MOST: usize = 512;
/// Of one source. Resolvers use one stream for many questions.
const MOST_OF_SOURCE: usize = 64;

/// Room for the streams of one worker; those of `own` have no limit of their own.
pub(super) fn places(own: Vec<IpAddr>) -> Rc<Places> {
    Places::new(own, MOST, MOST_OF_SOURCE)
}

/// Answers the questions on one stream. Before its client has completed the handshake it costs no place here: it counts
/// among the flows being opened, which the stack limits in number and in time.
/// Its questions that wait for nameservers count with those that come by datagrams.
pub(super) async fn stream(
    dispatcher: Rc<Dispatcher>,
    (streams, questions): (Rc<Places>, Rc<Places>),
    asker: Asker,
    mut stream: FlowStream,
) {
    stream.accept();
    poll_fn(|cx| stream.poll_open(cx)).await;
    if let Some(_place) = streams.enter(asker.client) {
        dispatcher.names(stream, asker, || questions.enter(asker.client)).await;
    }
}
