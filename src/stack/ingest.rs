//! From a packet that was read to the flow, the datagram or the answer that it stands for.

use std::time::Instant;

use super::ip::{self, Malformed, Packet};
use super::{Config, Counters, Event, Frame, Stack, Transmit, Unreachable, VirtioHeader};
use super::{datagram, echo, icmp, tcp};

impl Stack {
    /// Takes one packet in. Answers that cannot wait go to `transmit`; what somebody else has to do is returned.
    pub fn ingest<'a>(&'a mut self, frame: Frame<'a>, now: Instant, transmit: &mut dyn Transmit) -> Option<Event<'a>> {
        self.counters.packets += 1;
        self.counters.bytes += frame.packet.len() as u64;
        let packet = match Packet::parse(frame.packet) {
            Ok(packet) => packet,
            Err(why) => {
                self.counters.drop(why);
                return None;
            }
        };
        if !self.admits(&packet) {
            return None;
        }
        if let Some(fragment) = packet.fragment {
            return self.gather(&packet, fragment, now).map(Event::Whole);
        }
        self.deliver(packet, frame.header, now, transmit)
    }

    /// Sorts a whole packet to where it belongs.
    fn deliver<'a>(
        &mut self,
        packet: Packet<'a>,
        header: VirtioHeader,
        now: Instant,
        transmit: &mut dyn Transmit,
    ) -> Option<Event<'a>> {
        let Self { config, table, counters, errors, .. } = self;
        if packet.source.is_ipv6() && !config.ipv6 {
            counters.ignored += u64::from(!refuse_v6(&packet, transmit));
            return None;
        }
        match packet.protocol {
            ip::TCP => {
                let segment = match tcp::Segment::read(&packet, header.checksum_trusted()) {
                    Ok(segment) => segment,
                    Err(why) => {
                        counters.drop(why);
                        return None;
                    }
                };
                table.segment(&packet, &segment, counters, now, transmit)
            }
            ip::UDP => {
                if !header.checksum_trusted() && !datagram::checksum_holds(&packet) {
                    counters.bad_header += 1;
                    return None;
                }
                let datagram = datagram::read(&packet, header.datagram_size());
                counters.bad_length += u64::from(datagram.is_none());
                datagram.map(Event::Datagram)
            }
            _ if icmp::is_echo_request(&packet) => {
                if !header.checksum_trusted() && !icmp::checksum_holds(&packet) {
                    counters.bad_header += 1;
                    return None;
                }
                pass_echo(config, counters, &packet, transmit)
            }
            _ => {
                let told =
                    icmp::TooBig::read(&packet).filter(|_| header.checksum_trusted() || icmp::checksum_holds(&packet));
                match told {
                    Some(message) if !table.too_big(&message, now) => Some(Event::Stray(message.tuple)),
                    Some(_) => None,
                    None => {
                        counters.ignored += u64::from(!icmp::unknown_protocol(&packet, errors, now, transmit));
                        None
                    }
                }
            }
        }
    }

    /// Adds a piece to its packet; returns that once it is whole.
    fn gather(&mut self, packet: &Packet<'_>, fragment: ip::Fragment, now: Instant) -> Option<Vec<u8>> {
        self.counters.fragments += 1;
        let whole = self.reassembly.add(packet, fragment, now).and_then(|whole| match whole {
            // Pieces of a piece have no honest source.
            Some(whole) if Packet::parse(&whole)?.fragment.is_some() => Err(Malformed::Options),
            whole => Ok(whole),
        });
        whole.unwrap_or_else(|why| {
            self.counters.drop(why);
            None
        })
    }

    fn admits(&mut self, packet: &Packet<'_>) -> bool {
        let reserved = self.config.reserved.iter().any(|range| range.contains(&packet.source));
        if reserved && !self.config.own.contains(&packet.source) {
            self.counters.spoofed += 1;
            return false;
        }
        if ip::is_not_unicast(packet.destination) {
            self.counters.ignored += 1;
            return false;
        }
        true
    }
}

/// An echo request that is not for us to answer goes on, unless its time is over here (RFC 1812 section 5.3.1).
fn pass_echo<'a>(
    config: &Config,
    counters: &mut Counters,
    packet: &Packet<'a>,
    transmit: &mut dyn Transmit,
) -> Option<Event<'a>> {
    if config.echo.contains(&packet.destination) {
        icmp::echo_reply(packet, transmit);
        return None;
    }
    let Some(echo) = echo::read(packet) else {
        counters.bad_length += 1;
        return None;
    };
    let told = match config.hop(echo.source) {
        _ if !config.carry_echo => icmp::unreachable(packet.bytes, Unreachable::Prohibited, transmit),
        _ if echo.ttl > 1 => return Some(Event::Echo(echo)),
        Some(hop) => icmp::time_exceeded(hop, packet.bytes, transmit),
        None => false,
    };
    counters.ignored += u64::from(!told);
    None
}

/// `ipv6: false`: codes that programs take as "no IPv6 here" at once, TCP as ENETUNREACH, UDP as ECONNREFUSED.
/// False: the packet is one that must not be answered.
fn refuse_v6(packet: &Packet<'_>, transmit: &mut dyn Transmit) -> bool {
    let why = if packet.protocol == ip::UDP { Unreachable::Port } else { Unreachable::Network };
    icmp::unreachable(packet.bytes, why, transmit)
}
