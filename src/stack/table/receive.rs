//! What a segment does: it opens a flow, goes to the one it belongs to, or is answered in place of one that is gone.

use std::borrow::Cow;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use smoltcp::iface::SocketSet;
use smoltcp::socket::tcp::{self, CongestionControl, State};

use super::super::flow::{Flow, FlowStream, low_bits};
use super::super::frame::Transmit;
use super::super::ip::Packet;
use super::super::port::Cut;
use super::super::progress::{Progress, is_ahead};
use super::super::recovery::Terms;
use super::super::ring::Pool;
use super::super::tcp::{Acknowledgement, Blocks, Segment, clamp_segment_size, without_fin};
use super::super::tombstone::Tombstone;
use super::super::{Counters, Event, Handle, since};
use super::{Measure, Table, contained};

/// What is to be done with a segment that has a flow's tuple.
enum Verdict {
    /// It is the flow's.
    Its,
    /// A SYN in place of one that is still held, or of a flow that has come to its end.
    Anew,
    /// A SYN in the middle of a flow, or a reset that is not quite right, to be answered by an acknowledgement of what has
    /// come.
    Challenge,
    /// One more of those.
    Surplus,
    /// Data that no window ever offered.
    Beyond,
}

impl Table {
    /// Gives a segment to its flow, or opens one.
    pub(in super::super) fn segment<'a>(
        &mut self,
        packet: &Packet<'a>,
        segment: &Segment,
        counters: &mut Counters,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        let bytes: Cow<'_, [u8]> = if packet.source.is_ipv6() && packet.start > 40 {
            strip_extensions(packet).into()
        } else {
            packet.bytes.into()
        };
        if let Some(flow) = self.flows.get(&segment.tuple).map(Rc::clone) {
            match self.judge(&flow, segment, now) {
                Verdict::Its if segment.payload > 0 && !self.charge(&flow, now) => counters.no_memory += 1,
                Verdict::Its => {
                    self.take(&flow, &bytes, segment, now, transmit);
                }
                Verdict::Beyond => counters.ignored += 1,
                Verdict::Challenge => {
                    let mut inner = flow.borrow_mut();
                    self.tell(&mut inner, transmit);
                    if inner.progress.reception.owes() {
                        self.shared.queue(&flow, &mut inner);
                    }
                }
                Verdict::Surplus => counters.ignored += 1,
                Verdict::Anew => {
                    self.forget(&flow);
                    return self.begin(packet, &bytes, segment, counters, now, transmit);
                }
            }
            return None;
        }
        if !segment.opens() {
            return self.late(segment, counters, now, transmit);
        }
        if self.graveyard.find(&segment.tuple, now) == Some(Tombstone::Silence { initial: segment.sequence }) {
            counters.ignored += 1;
            return None;
        }
        self.begin(packet, &bytes, segment, counters, now, transmit)
    }

    /// Opens a flow for a SYN.
    fn begin<'a>(
        &mut self,
        packet: &Packet<'a>,
        bytes: &[u8],
        segment: &Segment,
        counters: &mut Counters,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        let Some(flow) = self.open(packet, segment, now) else {
            if self.budget.is_short() || self.pool.borrow().is_exhausted() {
                counters.no_memory += 1;
            } else {
                counters.flooded += 1;
            }
            return None;
        };
        self.graveyard.remove(&segment.tuple);
        let cut = flow.borrow().cut;
        if let Some(cut) = cut.filter(|cut| segment.segment_size.is_some_and(|size| size > cut.most)) {
            // smoltcp, which believes in a larger MTU, would send segments of this size.
            let mut bytes = bytes.to_vec();
            clamp_segment_size(&mut bytes, cut.most);
            self.feed(&flow, &bytes, segment, now, transmit);
        } else {
            self.feed(&flow, bytes, segment, now, transmit);
        }
        if flow.borrow_mut().socket().state() != State::SynReceived {
            // smoltcp would not have this SYN, for a reason that our own reading does not know.
            counters.bad_options += 1;
            self.forget(&flow);
            return None;
        }
        counters.flows += 1;
        Some(Event::Incoming(segment.tuple, FlowStream { flow, shared: Rc::clone(&self.shared) }))
    }

    /// What a segment is to a flow that has its tuple.
    fn judge(&self, flow: &Handle, segment: &Segment, now: Instant) -> Verdict {
        let mut flow = flow.borrow_mut();
        let flow = &mut *flow;
        if segment.opens() {
            let same = segment.sequence == flow.progress.initial;
            return match (flow.held.is_some(), flow.socket().state()) {
                // A SYN with another number while the first is still held: the client has started afresh.
                (true, _) if !same => Verdict::Anew,
                (true, _) => Verdict::Its,
                (false, State::SynReceived) if same => Verdict::Its,
                // Ended in this very batch, and only not looked at since.
                (false, State::Closed | State::Listen) => Verdict::Anew,
                // RFC 9293 section 3.10.7.4; smoltcp says nothing at all. A client that was restarted answers with a
                // reset, and its next SYN opens a flow.
                _ => challenge(flow, now),
            };
        }
        // After the SYN-ACK smoltcp takes the announced window, which is not scaled there, for one that is, and would
        // put data behind the end of its ring: a panic that any client could bring about.
        let (next, room) = flow.expects();
        // The same section: a reset that merely lies in the window may be somebody's guess (RFC 5961 section 3.2). A client
        // that means it answers with the right number. smoltcp would believe it.
        let finished =
            matches!(flow.socket().state(), State::CloseWait | State::Closing | State::LastAck | State::TimeWait);
        let ahead = segment.sequence.wrapping_sub(next.wrapping_add(finished.into())) as usize;
        if segment.is_reset() && flow.held.is_none() && (1..room).contains(&ahead) {
            return challenge(flow, now);
        }
        let behind = segment.end().wrapping_sub(next) as usize;
        let beyond = segment.payload > 0 && is_ahead(segment.sequence, next) && behind > room;
        if beyond && !flow.progress.past_syn { Verdict::Beyond } else { Verdict::Its }
    }

    /// A segment of no flow: one that has just ended, one of another worker, or none at all.
    fn late<'a>(
        &self,
        segment: &Segment,
        counters: &mut Counters,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        match self.graveyard.find(&segment.tuple, now) {
            Some(Tombstone::TimeWait { sequence, acknowledgement }) => {
                if segment.is_reset() || segment.end() == acknowledgement && !segment.is_last() {
                    counters.ignored += 1;
                } else {
                    let (tuple, blocks) = (segment.tuple, Blocks::default());
                    let bare = Acknowledgement { tuple, sequence, acknowledgement, window: 0, blocks };
                    bare.send(self.offload, transmit);
                }
                None
            }
            Some(Tombstone::Silence { .. }) => {
                counters.ignored += 1;
                None
            }
            None => Some(Event::Stray(segment.tuple)),
        }
    }

    fn open(&mut self, packet: &Packet<'_>, segment: &Segment, now: Instant) -> Option<Handle> {
        let own = self.own.contains(&segment.tuple.client.ip());
        let client = self.client_of(&segment.tuple);
        if !self.held.has_room(client, own) {
            return None;
        }
        let own_flows = self.budget.flows_of(client);
        let place = self.budget.open(client)?;
        let mut rings = Pool::take(&self.pool, client, (self.flows.len(), own_flows))?;
        // SAFETY: the slices live in the socket, which `Flow` drops before the rings.
        let (receive, send) = unsafe { rings.split() };
        let mut socket = tcp::Socket::new(tcp::SocketBuffer::new(receive), tcp::SocketBuffer::new(send));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        socket.pause_synack(true);
        // What may fly, and what flies again, is `Recovery`'s affair.
        socket.set_congestion_control(CongestionControl::None);
        socket.listen((segment.tuple.server.ip(), segment.tuple.server.port())).ok()?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        let cut = self.cut(segment, now);
        let terms = Terms {
            segment: self.segment_size(segment, cut),
            selective: segment.selective,
            remote: !own,
            ring: rings.size(),
        };
        let flow = Rc::new(RefCell::new(Flow {
            tuple: segment.tuple,
            sockets,
            handle,
            rings,
            place,
            cut,
            held: Some(packet.bytes[..packet.bytes.len().min(128)].into()),
            counted: true,
            dead: false,
            dirty: false,
            orphan: false,
            aborted: false,
            evicted: false,
            refusal: None,
            finishing: false,
            armed: None,
            watchers: [None, None],
            starving: None,
            heartbeat: None,
            progress: Progress::new(segment.sequence, segment.scale, terms, now),
        }));
        self.held.enter(client);
        self.start_looking(now);
        self.flows.insert(segment.tuple, Rc::clone(&flow));
        Some(flow)
    }

    /// Gives a segment to its flow in such pieces as smoltcp handles right: it would cut data that exceeds the window
    /// and take the FIN behind it all the same, so that the stream ends early and its rest is lost. The window's edge
    /// moves back by up to its unit whenever less than that is read, so that honest clients meet it.
    fn take(&mut self, handle: &Handle, bytes: &[u8], segment: &Segment, now: Instant, transmit: &mut dyn Transmit) {
        let renewed = handle.borrow_mut().renewed(bytes, segment);
        let bytes = renewed.as_deref().unwrap_or(bytes);
        let (next, room) = handle.borrow_mut().expects();
        let end = segment.end();
        let news = segment.payload > 0 && end != next && is_ahead(end, next);
        let beyond = news && is_ahead(next, segment.sequence) && end.wrapping_sub(next) as usize > room;
        if news && segment.is_last() || beyond {
            let excess = if beyond { end.wrapping_sub(next) as usize - room } else { 0 };
            let data = without_fin(bytes, segment.payload - excess);
            self.feed(handle, &data, &segment.shortened(excess), now, transmit);
        } else {
            self.feed(handle, bytes, segment, now, transmit);
        }
        if let Some(last) = self.ending(handle, segment, transmit) {
            self.feed(handle, &last.packet(), &last, now, transmit);
        }
    }

    /// The measure by which packets to a new client are cut, if smoltcp does not see to that.
    fn cut(&self, syn: &Segment, now: Instant) -> Option<Cut> {
        let v6 = syn.tuple.server.is_ipv6();
        let own = if self.offload && v6 { Cut::of_device(self.mtu, syn.segment_size) } else { None };
        match self.paths.find(syn.tuple.client.ip(), now) {
            Some(mtu) => Cut::for_path(own, v6, mtu),
            None => own,
        }
    }

    /// The payload of the largest segments that the client takes and the path carries, in bytes.
    fn segment_size(&self, syn: &Segment, cut: Option<Cut>) -> usize {
        let headers = if syn.tuple.server.is_ipv6() { 60 } else { 40 };
        // As smoltcp reads it: 536 where nothing is said, and at least 48.
        let announced = syn.segment_size.filter(|size| *size > 0).map_or(536, usize::from).max(48);
        let cut = cut.map_or(usize::MAX, |cut| cut.segment.get().into());
        announced.min(self.mtu.saturating_sub(headers)).min(cut).max(1)
    }

    /// Pays for the rings of a flow that gets data. False: there is no room, and the data is lost; its sender repeats it.
    fn charge(&mut self, handle: &Handle, now: Instant) -> bool {
        let mut flow = handle.borrow_mut();
        if flow.rings.charged() > 0 {
            return true;
        }
        let charged = flow.rings.charge();
        if charged {
            self.keep_warm(&mut flow, now);
        }
        charged
    }

    fn feed(&mut self, handle: &Handle, bytes: &[u8], segment: &Segment, now: Instant, transmit: &mut dyn Transmit) {
        let mut guard = handle.borrow_mut();
        let flow = &mut *guard;
        flow.heard(now);
        let welcome = flow.welcome(segment);
        let arrival = flow.arrival(segment);
        let side = &mut self.sides[usize::from(flow.tuple.server.is_ipv6())];
        let measure = Measure { cut: flow.cut, end: flow.place_of_bare(), keep: arrival.is_some() };
        let (echo, sockets, time) = (flow.is_echo(segment), &mut flow.sockets, since(self.epoch, now));
        let ingest = || if echo { None } else { side.ingest(bytes, measure, sockets, time, transmit) };
        let Some(sent) = contained(ingest) else {
            flow.give_up();
            // Its reset is still to be sent, and whoever waits for it to be told.
            return self.shared.queue(handle, flow);
        };
        if let Some(sent) = sent {
            flow.progress.note_sent(sent, now);
        }
        if let Some(arrival) = arrival {
            self.settle(flow, &arrival, sent, transmit);
        }
        let state = flow.socket().state();
        flow.progress.finished |= matches!(state, State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        let taken = segment.acknowledgement.is_some_and(|number| flow.progress.note_acknowledged(number));
        if let Some(heartbeat) = flow.heartbeat.as_ref().filter(|_| taken) {
            heartbeat.beat(now);
        }
        flow.hear(segment, welcome, now);
        flow.close_late();
        let (next, room) = flow.expects();
        // What lies beyond the ring was not taken.
        if segment.payload > 0 && segment.end().wrapping_sub(next.wrapping_add(low_bits(room))) as i32 <= 0 {
            if is_ahead(segment.end(), flow.progress.highest) {
                flow.progress.highest = segment.end();
            }
            flow.rings.touch(segment.payload);
            self.warm_up(flow, now);
        }
        self.shared.queue(handle, flow);
    }
}

/// Asks the client whether it means that, by an acknowledgement of what has come. Before the SYN-ACK there is nothing to
/// acknowledge with.
fn challenge(flow: &mut Flow, now: Instant) -> Verdict {
    if flow.progress.end().is_some() && flow.progress.may_challenge(now) {
        Verdict::Challenge
    } else {
        Verdict::Surplus
    }
}

/// The packet without its IPv6 extension headers, which have done their work.
fn strip_extensions(packet: &Packet<'_>) -> Vec<u8> {
    let mut bytes = packet.bytes[..40].to_vec();
    bytes.extend_from_slice(packet.payload());
    let length = (bytes.len() - 40) as u16;
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    bytes[6] = packet.protocol;
    bytes
}
