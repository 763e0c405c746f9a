//! What the rules of a base chain decide by the interface, by what the kernel shows of them.

use std::collections::BTreeMap;

use super::nftables::{attribute, attributes, number, text};
use crate::platform::gate::{Decision, Hook, Interface, LONGEST_NAME, Which};

/// `NFT_META_*`: by number and by name, in and out, and the protocol.
const INTERFACE_IN: (u32, u32) = (4, 6);
const INTERFACE_OUT: (u32, u32) = (5, 7);
const PROTOCOL: u32 = 16;
/// `NFT_CT_STATE`, and of its values the bit of connections that were answered (`NF_CT_STATE_BIT`).
const STATE: u32 = 0;
const ESTABLISHED: u32 = 2;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`, and where the destination's port stands in it.
const TRANSPORT: u32 = 2;
const TO_PORT: u32 = 2;
/// `NFT_CMP_*`.
const EQUAL: u32 = 0;
const DIFFERENT: u32 = 1;
/// Verdicts (`NF_*` and `NFT_*`).
const DROP: i32 = 0;
const CONTINUE: i32 = -1;
const BREAK: i32 = -2;
const RETURN: i32 = -5;
/// Protocols of which a host's programs do not live: ICMP, IGMP, ICMPv6.
const CONTROL: [u8; 3] = [1, 2, 58];

/// What a register holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    Index,
    Name,
    Protocol,
    ToPort,
    /// The state of the connection, with the bits of it that are left.
    State(u32),
}

/// A rule, and what it asks of sets that belong to it alone.
#[derive(Debug)]
pub(super) struct Read {
    decision: Decision,
    /// Each by its name.
    pub(super) sets: Vec<(Held, String)>,
}

#[derive(Debug, Default)]
struct Reading {
    registers: BTreeMap<u32, Held>,
    interfaces: Vec<Interface>,
    partly: bool,
    /// It is not about the answers that programs wait for, or what they send.
    beside: bool,
    sets: Vec<(Held, String)>,
    /// It may let pass (true), or stops (false).
    verdict: Option<bool>,
}

/// What one rule of a chain on `hook` decides, by the list of its expressions. `drops`: the policy of the chain. None: nothing
/// about the answers that programs wait for, or what they send.
pub(super) fn of_rule(hook: Hook, drops: bool, expressions: &[u8]) -> Option<Read> {
    let mut reading = Reading::default();
    for (_, expression) in attributes(expressions) {
        let name = text(expression, 1).unwrap_or_default();
        reading.take(hook, drops, &name, attribute(expression, 2).unwrap_or_default());
    }
    let Reading { interfaces, partly, beside, verdict, sets, .. } = reading;
    let lets_pass = verdict.filter(|_| !beside)?;
    Some(Read { decision: Decision { interfaces, partly, lets_pass }, sets })
}

impl Read {
    /// What it decides, with the elements of each of its sets; none for one that has ranges.
    pub(super) fn decision(self, hook: Hook, elements: &[Option<Vec<Vec<u8>>>]) -> Option<Decision> {
        let mut decision = self.decision;
        for ((held, _), elements) in self.sets.iter().zip(elements) {
            match (held, elements) {
                // Keys of several fields in one are longer, and no names.
                (Held::Name, Some(names)) if names.iter().all(|name| name.len() == LONGEST_NAME) => {
                    decision.interfaces.push(Interface { which: Which::OneOf(names.clone()), not: false });
                }
                (Held::Protocol, Some(all)) if all.iter().flatten().all(|it| CONTROL.contains(it)) => return None,
                (Held::ToPort, Some(_)) if hook == Hook::Input => return None,
                _ => {}
            }
        }
        Some(decision)
    }
}

/// Adds the keys in a message of elements to `found`, which is none from a range on.
pub(super) fn elements(found: &mut Option<Vec<Vec<u8>>>, message: &[u8]) {
    for (_, element) in attribute(message, 3).into_iter().flat_map(attributes) {
        let key = attribute(element, 1).and_then(|key| attribute(key, 1)).filter(|_| number(element, 3).is_none());
        match (key, found.as_mut()) {
            (Some(key), Some(found)) => found.push(key.to_vec()),
            _ => *found = None,
        }
    }
}

impl Reading {
    fn take(&mut self, hook: Hook, drops: bool, name: &str, data: &[u8]) {
        match name {
            "counter" | "log" => {}
            "meta" | "ct" | "payload" => self.load(hook, name, data),
            "bitwise" => {
                let held = number(data, 1).and_then(|from| self.registers.get(&from).copied());
                let mask = attribute(data, 4).and_then(|mask| attribute(mask, 1)).and_then(|mask| mask.try_into().ok());
                let left = match (held, mask.map(u32::from_ne_bytes)) {
                    (Some(Held::State(bits)), Some(mask)) => Some(Held::State(bits & mask)),
                    _ => None,
                };
                self.hold(number(data, 2), left);
            }
            "cmp" => self.compare(hook, data),
            "immediate" => match verdict(data) {
                Some(DROP) => self.verdict = Some(false),
                Some(RETURN) => self.verdict = Some(!drops),
                Some(CONTINUE | BREAK) | None => {}
                // Accepted, or asked elsewhere.
                Some(_) => self.verdict = Some(true),
            },
            "reject" => self.verdict = Some(false),
            // iptables-nft.
            "target" => match text(data, 1).unwrap_or_default().as_str() {
                "REJECT" | "DROP" => self.verdict = Some(false),
                "LOG" | "NFLOG" => {}
                _ => self.verdict = Some(true),
            },
            "queue" => self.verdict = Some(true),
            _ => {
                self.partly = true;
                let held = number(data, 2).and_then(|at| self.registers.get(&at).copied()).filter(|_| name == "lookup");
                // Not one that may be large, nor a question for what is not in it.
                let own = text(data, 1).filter(|set| set.starts_with("__set") && number(data, 5).unwrap_or(0) == 0);
                self.sets.extend(held.zip(own));
                // A map of verdicts: its register is the one that verdicts have.
                let map = name == "lookup" && number(data, 3) == Some(0);
                self.verdict = if map { Some(true) } else { self.verdict };
            }
        }
    }

    fn load(&mut self, hook: Hook, name: &str, data: &[u8]) {
        let (index, named) = if hook == Hook::Input { INTERFACE_IN } else { INTERFACE_OUT };
        let key = number(data, 2);
        let held = match name {
            "meta" if key == Some(index) => Some(Held::Index),
            "meta" if key == Some(named) => Some(Held::Name),
            "meta" if key == Some(PROTOCOL) => Some(Held::Protocol),
            "ct" if key == Some(STATE) => Some(Held::State(u32::MAX)),
            "payload" if (key, number(data, 3), number(data, 4)) == (Some(TRANSPORT), Some(TO_PORT), Some(2)) => {
                Some(Held::ToPort)
            }
            _ => None,
        };
        self.hold(number(data, 1), held);
    }

    fn hold(&mut self, register: Option<u32>, held: Option<Held>) {
        let Some(register) = register else { return };
        match held {
            Some(held) => self.registers.insert(register, held),
            None => self.registers.remove(&register),
        };
    }

    fn compare(&mut self, hook: Hook, data: &[u8]) {
        let held = number(data, 1).and_then(|at| self.registers.get(&at).copied());
        let value = attribute(data, 3).and_then(|data| attribute(data, 1)).unwrap_or_default();
        let how = number(data, 2);
        let equal = how == Some(EQUAL);
        let which = match held {
            Some(Held::Name) => Some(Which::Name(value.to_vec())),
            Some(Held::Index) => value.try_into().ok().map(|value| Which::Index(u32::from_ne_bytes(value))),
            _ => None,
        };
        if let Some(which) = which.filter(|_| matches!(how, Some(EQUAL | DIFFERENT))) {
            self.interfaces.push(Interface { which, not: !equal });
            return;
        }
        self.partly = true;
        // Answers come to ports that the kernel picks, on connections that it knows.
        self.beside |= match held {
            Some(Held::Protocol) => equal && value.iter().any(|it| CONTROL.contains(it)),
            Some(Held::ToPort) => equal && hook == Hook::Input,
            Some(Held::State(bits)) => how == Some(DIFFERENT) && bits & ESTABLISHED == 0 && hook == Hook::Input,
            _ => false,
        };
    }
}

/// The verdict that a constant is, if it is one.
fn verdict(data: &[u8]) -> Option<i32> {
    number(attribute(attribute(data, 2)?, 2)?, 1).map(u32::cast_signed)
}
