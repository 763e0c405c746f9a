//! Packets in: read from the queue or taken over from another worker, given to the stack, and what the stack asks for
//! in return.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Instant;

use tokio::task::spawn_local;

use super::contained::contained;
use super::crew::{Crew, Parcel};
use super::streams::stream;
use super::{QUOTED, Tunnel};
use crate::dispatch::{Back, EchoBack, Ping};
use crate::dns::{Answer, Asker, Transport};
use crate::net::{Echo, Reach};
use crate::session::{Inbound, Network, Session};
use crate::stack::{self, Claim, Datagram, Event, Frame, Refusal, Tuple, VirtioHeader};

/// Packets read before flows get their turn.
const BATCH: usize = 64;

/// An answer that leaves once its fake addresses are in the log.
pub(super) struct Reply {
    from: SocketAddr,
    to: SocketAddr,
    message: Vec<u8>,
}

impl Tunnel {
    /// Reads and ingests up to a batch, and sends what came of it. True: more may wait.
    pub(super) fn read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> io::Result<bool> {
        let mut replies = Vec::new();
        let more = self.read_batch(cx, buffer, &mut replies);
        self.dispatcher.flush();
        self.answer(replies);
        more
    }

    fn read_batch(&self, cx: &mut Context<'_>, buffer: &mut [u8], replies: &mut Vec<Reply>) -> io::Result<bool> {
        let mut more = self.take_parcels(cx, replies);
        let Poll::Ready(guard) = self.queue.poll_read_ready(cx) else { return Ok(more) };
        let mut guard = guard?;
        for turn in 0..BATCH {
            match guard.try_io(|queue| queue.get_ref().read(buffer)) {
                Ok(Ok((layout, length))) => {
                    let header = layout
                        .header
                        .and_then(|at| buffer.get(at..at + VirtioHeader::LEN)?.try_into().ok())
                        .map_or(VirtioHeader::PLAIN, VirtioHeader::parse);
                    let frame = Frame { header, packet: &buffer[layout.packet..length] };
                    contained(&self.dispatcher.core().counters, || self.ingest(frame, replies));
                    more |= turn + 1 == BATCH;
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_would_block) => break,
            }
        }
        Ok(more)
    }

    /// Ingests what other workers handed over, up to a batch. True: more may wait.
    fn take_parcels(&self, cx: &mut Context<'_>, replies: &mut Vec<Reply>) -> bool {
        for _ in 0..BATCH {
            let parcel = self.crew.borrow_mut().inbox.poll_recv(cx);
            let Poll::Ready(Some(Parcel { header, packet })) = parcel else { return false };
            let frame = Frame { header, packet: &packet };
            contained(&self.dispatcher.core().counters, || self.place(frame, true, replies));
        }
        true
    }

    /// Ingests a packet of our own queue, or one that we have put together, unless another worker has to.
    pub(super) fn ingest(&self, frame: Frame<'_>, replies: &mut Vec<Reply>) {
        self.place(frame, false, replies);
    }

    /// Ingests a packet, unless another worker has to. `handed`: another one has found that it is for us. By now that may be
    /// otherwise: where a flow with the tuple of a SYN has ended meanwhile, nobody owns it until it is claimed again.
    fn place(&self, frame: Frame<'_>, handed: bool, replies: &mut Vec<Reply>) {
        let crew = self.crew.borrow();
        if crew.is_alone() {
            drop(crew);
            return self.digest(frame, handed, replies);
        }
        let claim = stack::claim(frame.packet);
        let elsewhere = match claim {
            None => None,
            Some(Claim::Flow(tuple)) => Some(crew.claim(tuple)).filter(|owner| !crew.is(*owner)),
            Some(Claim::Piece(source, destination, id)) => crew.owner_of_fragments((source, destination, id)),
        };
        if let Some(owner) = elsewhere {
            self.hand(&crew, owner, frame);
            return;
        }
        drop(crew);
        self.digest(frame, handed, replies);
        if let Some(Claim::Flow(tuple)) = claim
            && !self.stack.borrow().knows(&tuple)
        {
            self.crew.borrow().release(&tuple);
        }
    }

    fn hand(&self, crew: &Crew, owner: usize, frame: Frame<'_>) {
        if !crew.hand(owner, frame.header, frame.packet) {
            self.dispatcher.core().counters.hand_over_lost.fetch_add(1, Relaxed);
        }
    }

    /// Gives a packet to the stack and does what it asks for. `handed`: another worker has already looked for an owner.
    fn digest(&self, frame: Frame<'_>, handed: bool, replies: &mut Vec<Reply>) {
        let now = Instant::now();
        let mut stack = self.stack.borrow_mut();
        let mut writer = self.writer.borrow_mut();
        match stack.ingest(frame, now, &mut *writer) {
            None => {}
            Some(Event::Whole(packet)) => {
                drop((stack, writer));
                // Nobody could tell its flow by the pieces, so nobody has looked for an owner yet.
                self.ingest(Frame { header: VirtioHeader::PLAIN, packet: &packet }, replies);
            }
            Some(Event::Stray(tuple)) => {
                let crew = self.crew.borrow();
                match crew.owner(&tuple).filter(|_| !handed) {
                    Some(owner) => self.hand(&crew, owner, frame),
                    None => stack.reset(frame, now, &mut *writer),
                }
            }
            Some(Event::Incoming(tuple, incoming)) => self.incoming(tuple, incoming),
            Some(Event::Datagram(datagram)) => self.datagram(&datagram, frame.header, now, replies),
            Some(Event::Echo(echo)) => self.echo(&echo, frame.header),
        }
    }

    fn incoming(&self, tuple: Tuple, incoming: stack::FlowStream) {
        let dispatcher = Rc::clone(&self.dispatcher);
        if self.hijack.takes(tuple.server) {
            if dispatcher.core().has_question_come_back(Network::Tcp, tuple.client, tuple.server) {
                return incoming.refuse(Refusal::Network);
            }
            let places = (Rc::clone(&self.streams), Rc::clone(&self.questions));
            spawn_local(stream(dispatcher, places, self.asker(tuple.client, tuple.server), incoming));
        } else {
            spawn_local(dispatcher.flow(tuple, incoming));
        }
    }

    fn datagram(&self, datagram: &Datagram<'_>, header: VirtioHeader, now: Instant, replies: &mut Vec<Reply>) {
        if self.hijack.takes(datagram.destination) {
            let (from, to) = (datagram.source, datagram.destination);
            if self.dispatcher.core().has_question_come_back(Network::Udp, from, to) {
                let quoted = &datagram.packet[..datagram.packet.len().min(QUOTED)];
                return Back::unreachable(&*self.back, &to.into(), from, quoted, Reach::Port);
            }
            // A coalesced packet carries several datagrams of one size.
            let size = datagram.size.map_or(datagram.payload.len().max(1), |size| usize::from(size.get()));
            datagram.payload.chunks(size).for_each(|query| self.query(query, datagram, now, replies));
            return;
        }
        let crew = self.crew.borrow();
        if let Some(owner) = crew.owner_of_source(datagram.source) {
            return self.hand(&crew, owner, Frame { header, packet: datagram.packet });
        }
        let quoted = &datagram.packet[..datagram.packet.len().min(QUOTED)];
        let back: Rc<dyn Back> = self.back.clone();
        let session = Session::new(Network::Udp, Inbound::Tun, datagram.source, datagram.destination.into());
        let Datagram { payload, size, dont_fragment, .. } = *datagram;
        self.dispatcher.packet(&session, payload, size, dont_fragment, quoted, &back);
    }

    fn echo(&self, request: &stack::Echo<'_>, header: VirtioHeader) {
        let stack::Echo { source, destination, id, sequence, payload, ttl, tos, dont_fragment, head, packet } =
            *request;
        let crew = self.crew.borrow();
        // All requests with one id of a client are one worker's, as are the datagrams of one port.
        if let Some(owner) = crew.owner_of_source(SocketAddr::new(source, id)) {
            return self.hand(&crew, owner, Frame { header, packet });
        }
        let back: Rc<dyn EchoBack> = self.back.clone();
        let echo = Echo { id, sequence, payload, ttl, tos, dont_fragment };
        self.dispatcher.echo(&Ping { source, destination, echo, head, packet }, &back);
    }

    /// Who asks where a question goes from `client` to `server`.
    fn asker(&self, client: SocketAddr, server: SocketAddr) -> Asker {
        let (client, server) = (client.ip(), self.hijack.meant_for(server));
        Asker { client, server, is_host: self.questions.is_own(client) }
    }

    fn query(&self, query: &[u8], datagram: &Datagram<'_>, now: Instant, replies: &mut Vec<Reply>) {
        let (from, to) = (datagram.destination, datagram.source);
        let mut message = Vec::with_capacity(512);
        match self.dns.answer(query, Transport::Udp, self.asker(to, from), now, &mut message) {
            Answer::Ready => replies.push(Reply { from, to, message }),
            Answer::Ask(question) => match self.questions.enter(to.ip()) {
                Some(place) => {
                    let (dns, back) = (Arc::clone(&self.dns), Rc::clone(&self.back));
                    spawn_local(async move {
                        let message = dns.ask(question).await;
                        back.deliver(&from.into(), to, &message);
                        drop(place);
                    });
                }
                None => self.dns.counters().drop_question(),
            },
            Answer::Drop => {}
        }
    }

    /// Sends answers that were made in this batch; one write of the fake-IP log goes before all of them.
    fn answer(&self, replies: Vec<Reply>) {
        if replies.is_empty() {
            return;
        }
        self.dns.flush();
        let (mut stack, mut writer) = (self.stack.borrow_mut(), self.writer.borrow_mut());
        for reply in replies {
            stack.send(reply.from, reply.to, &reply.message, &mut *writer);
        }
    }
}
