//! Which bits of marks the rules of others read and write, by what the kernel shows of their rules.

use std::collections::BTreeMap;

use super::nftables::{attribute, attributes, number, text};

/// `NFT_META_MARK` and `NFT_CT_MARK`.
const MARK: u32 = 3;

/// How two values are compared (`enum nft_cmp_ops`).
const LESS: u32 = 2;
const LESS_OR_EQUAL: u32 = 3;
const GREATER: u32 = 4;
const GREATER_OR_EQUAL: u32 = 5;

/// `NFT_SOCKET_MARK`.
const SOCKET_MARK: u32 = 1;

/// By their numbers.
type Registers = BTreeMap<u32, Register>;

/// What is known of a register of the kernel's small machine.
#[derive(Debug, Clone, Copy, Default)]
struct Register {
    /// It holds a mark.
    mark: bool,
    /// In network order.
    swapped: bool,
    /// Of something else: the bits that it may have. Of a mark: those that were changed in it.
    bits: u32,
    /// The bits of a mark that are looked at, if it is compared.
    seen: Option<u32>,
    /// What it has been found to be at least: a range is compared by its two ends.
    least: u32,
}

/// The bits that a value means, or that a mask leaves: "mark & 0xffffbfff | 0x4000" touches those that its first number
/// leaves out.
pub(super) fn bits(value: u32) -> u32 {
    if value.count_ones() > 16 { !value } else { value }
}

/// The bits of the marks `first` to `last`: theirs, and each that alone makes a mark of that range. A range of which every
/// mark is, but for few, is nobody's choice of bits.
pub(super) fn bits_between(first: u32, last: u32) -> u32 {
    let alone = (0..u32::BITS).map(|bit| 1 << bit).filter(|bit| (first..=last).contains(bit));
    let all = alone.fold(first | last, |found, bit| found | bit);
    if all == u32::MAX { bits(first) | bits(last) } else { all }
}

/// A value of four bytes, in this machine's order as marks are. Others, addresses of IPv6 for instance, are none.
pub(super) fn value(data: &[u8]) -> Option<u32> {
    let bytes = attribute(data, 1)?;
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// The bits that one rule reads or writes, by the list of its expressions. The elements of sets are not among them.
pub(super) fn of_rule(expressions: &[u8]) -> u32 {
    let mut registers = Registers::new();
    let found = attributes(expressions).fold(0, |found, (_, expression)| {
        let name = text(expression, 1).unwrap_or_default();
        found | attribute(expression, 2).map_or(0, |data| step(&mut registers, &name, data))
    });
    found | touched(&registers)
}

/// What was changed in marks that nobody has compared with anything.
fn touched(registers: &Registers) -> u32 {
    registers.values().filter(|held| held.mark).fold(0, |found, held| found | held.bits)
}

/// What one expression adds, and what it leaves in the registers.
fn step(registers: &mut Registers, name: &str, data: &[u8]) -> u32 {
    let held = |at: u16| register(data, at).and_then(|at| registers.get(&at).copied()).unwrap_or_default();
    let at = |at: u16, held: Register| value_at(data, at, held).map_or(0, bits);
    match name {
        "meta" | "ct" => {
            let mark = number(data, 2) == Some(MARK);
            let source = held(if name == "meta" { 3 } else { 4 });
            match register(data, 1) {
                Some(to) => overwrite(registers, to, 4, Register { mark, ..Register::default() }),
                None if mark => source.bits,
                None => 0,
            }
        }
        "socket" => {
            let mark = number(data, 1) == Some(SOCKET_MARK);
            register(data, 2).map_or(0, |to| overwrite(registers, to, 4, Register { mark, ..Register::default() }))
        }
        // What is written into a packet or a header leaves the registers as they are.
        "payload" | "exthdr" | "fib" | "rt" => {
            let length = number(data, 4).filter(|_| name == "payload" || name == "exthdr").unwrap_or(4);
            register(data, 1).map_or(0, |to| overwrite(registers, to, length, Register::default()))
        }
        "bitwise" => {
            let source = held(1);
            let mask = value_at(data, 4, source);
            let seen = source.seen.or(mask).zip(mask).map(|(before, now)| before & now);
            let left = Register { bits: source.bits | at(4, source) | at(5, source), seen, ..source };
            registers.extend(register(data, 2).map(|to| (to, left)));
            0
        }
        "byteorder" => {
            let source = held(1);
            registers.extend(register(data, 2).map(|to| (to, Register { swapped: !source.swapped, ..source })));
            0
        }
        "immediate" => {
            let constant = Register { bits: at(2, Register::default()), ..Register::default() };
            registers.extend(register(data, 1).map(|to| (to, constant)));
            0
        }
        "cmp" | "range" if held(1).mark => {
            let source = held(1);
            let compared_with = |at| value_at(data, at, source);
            let with = match (name, number(data, 2)) {
                ("range", _) => compared_with(3).zip(compared_with(4)).map(|(first, last)| bits_between(first, last)),
                (_, Some(LESS | LESS_OR_EQUAL)) => compared_with(3).map(|last| bits_between(source.least, last)),
                _ => compared_with(3).map(bits),
            };
            if let (Some(GREATER | GREATER_OR_EQUAL), Some(least)) = (number(data, 2), compared_with(3)) {
                registers.extend(register(data, 1).map(|to| (to, Register { least, ..source })));
            }
            with.unwrap_or_default() | compared(registers, source.seen)
        }
        // Of a set the elements are counted. A key has as many registers as its parts need, one behind the other.
        "lookup" | "dynset" => {
            let first = register(data, if name == "lookup" { 2 } else { 4 }).unwrap_or_default();
            let parts: Vec<Register> =
                registers.range(first..).map(|(_, held)| *held).filter(|held| held.mark).collect();
            let seen = parts.iter().fold(0, |found, part| found | compared(registers, part.seen));
            // What a map gives is no mark of a packet.
            if let Some(to) = register(data, 3).filter(|_| name == "lookup") {
                registers.remove(&to);
            }
            seen
        }
        "cmp" | "range" | "counter" | "limit" | "log" | "quota" => 0,
        "match" | "target" => of_extension(&text(data, 1).unwrap_or_default(), attribute(data, 3).unwrap_or_default()),
        // Whatever it puts where is no mark.
        _ => {
            let found = touched(registers);
            registers.clear();
            found
        }
    }
}

/// Puts what is `new` into a register and clears those behind it that `length` bytes reach, and returns what was changed in
/// marks that are gone now.
fn overwrite(registers: &mut Registers, first: u32, length: u32, new: Register) -> u32 {
    let reached = registers.range(first..first.saturating_add(length.div_ceil(4).max(1)));
    let numbers: Vec<u32> = reached.map(|(number, _)| *number).collect();
    let gone: Registers = numbers.into_iter().filter_map(|number| registers.remove_entry(&number)).collect();
    registers.insert(first, new);
    touched(&gone)
}

/// The bits that are looked at where a mark is compared of which `seen` is left: whatever bears one of them besides is no
/// longer what was meant. Without a mask one value is.
fn compared(registers: &mut Registers, seen: Option<u32>) -> u32 {
    registers.values_mut().filter(|held| held.mark && held.seen == seen).for_each(|held| held.bits = 0);
    seen.unwrap_or_default()
}

/// The register that an attribute names: those of 16 bytes (`NFT_REG_1` to `NFT_REG_4`) by the first of 4 that they consist of.
fn register(data: &[u8], at: u16) -> Option<u32> {
    number(data, at).map(|number| if (1..=4).contains(&number) { 8 + (number - 1) * 4 } else { number })
}

/// A value that what is `held` is compared with, or changed by.
fn value_at(data: &[u8], at: u16, held: Register) -> Option<u32> {
    let value = attribute(data, at).and_then(value)?;
    Some(if held.swapped { u32::from_be(value) } else { value })
}

/// The bits that a match or target of iptables reads or writes (linux/netfilter/xt_mark.h, xt_connmark.h, xt_TPROXY.h).
pub(in crate::platform::linux) fn of_extension(name: &str, data: &[u8]) -> u32 {
    let word = |at: usize| {
        let bytes = data.get(at * 4..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    };
    // A full mask says only that one exact value is meant, or that all of a mark is copied.
    let mask = |at| if word(at) == u32::MAX { 0 } else { word(at) };
    match name {
        "mark" | "connmark" | "MARK" => word(0) | mask(1),
        "CONNMARK" => word(0) | mask(1) | mask(2),
        "TPROXY" => mask(0) | word(1),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn numbers(list: &[(u16, u32)]) -> Vec<u8> {
        list.iter().flat_map(|(kind, value)| nested(*kind, &value.to_be_bytes())).collect()
    }

    fn data(kind: u16, value: u32) -> Vec<u8> {
        nested(kind, &nested(1, &value.to_ne_bytes()))
    }

    fn rule(expressions: &[(&str, Vec<u8>)]) -> u32 {
        let one = |(name, data): &(&str, Vec<u8>)| {
            let inner = [nested(1, format!("{name}\0").as_bytes()), nested(2, data)].concat();
            nested(1, &inner)
        };
        of_rule(&expressions.iter().flat_map(one).collect::<Vec<u8>>())
    }

    fn load() -> (&'static str, Vec<u8>) {
        ("meta", numbers(&[(1, 1), (2, MARK)]))
    }

    fn and_xor(mask: u32, xor: u32) -> (&'static str, Vec<u8>) {
        ("bitwise", [numbers(&[(1, 1), (2, 1)]), data(4, mask), data(5, xor)].concat())
    }

    fn compared(with: u32) -> (&'static str, Vec<u8>) {
        ("cmp", [numbers(&[(1, 1), (2, 0)]), data(3, with)].concat())
    }

    #[test]
    fn what_a_rule_compares_a_mark_with_and_sets_it_to_is_in_use() {
        assert_eq!(rule(&[load(), and_xor(0x4000, 0), compared(0x4000)]), 0x4000);
        assert_eq!(rule(&[load(), and_xor(0xfff7_bfff, 0x80000)]), 0x84000);
        assert_eq!(rule(&[load(), compared(51820)]), 51820);
        let set = ("meta", numbers(&[(2, MARK), (3, 1)]));
        let constant = |value| ("immediate", [numbers(&[(1, 1)]), data(2, value)].concat());
        assert_eq!(rule(&[constant(0x10), set.clone()]), 0x10);
        assert_eq!(rule(&[load(), set]), 0, "a copy");
        let connection = ("ct", numbers(&[(2, MARK), (4, 1)]));
        assert_eq!(rule(&[constant(0x20), connection]), 0x20);
    }

    #[test]
    fn of_a_mask_that_is_compared_with_the_bits_count_that_it_leaves_however_many() {
        assert_eq!(rule(&[load(), and_xor(0x00ff_ffff, 0), compared(0x12_3456)]), 0x00ff_ffff);
        assert_eq!(rule(&[load(), and_xor(0xffff_ff00, 0), compared(0x100)]), 0xffff_ff00);
        let looked_up = ("lookup", numbers(&[(2, 1)]));
        assert_eq!(rule(&[load(), and_xor(0x00ff_fff0, 0), looked_up]), 0x00ff_fff0);
        // Of one that is written, those that it takes away.
        let set = ("meta", numbers(&[(2, MARK), (3, 1)]));
        assert_eq!(rule(&[load(), and_xor(0xffff_ff00, 0x10), set]), 0xff | 0x10);
        let twice = [load(), and_xor(0x10, 0), compared(0x10), load(), and_xor(0xffff_bfff, 0x4000)];
        assert_eq!(rule(&twice), 0x4010);
    }

    #[test]
    fn what_is_compared_with_an_address_is_no_mark() {
        let address = ("payload", numbers(&[(1, 1), (2, 1), (3, 12), (4, 4)]));
        assert_eq!(rule(&[load(), compared(1), address.clone(), compared(0x0a00_0001)]), 1);
        assert_eq!(rule(&[("meta", numbers(&[(1, 1), (2, 4)])), compared(7)]), 0, "an interface");
        assert_eq!(rule(&[address, compared(7), load(), compared(8)]), 8);
    }

    #[test]
    fn a_range_of_marks_is_compared_in_network_order() {
        let turned = ("byteorder", numbers(&[(1, 1), (2, 1)]));
        assert_eq!(rule(&[load(), turned, compared(0x10_u32.to_be())]), 0x10);
    }

    #[test]
    fn of_a_range_of_marks_each_bit_counts_that_is_one_of_them_alone() {
        assert_eq!(bits_between(0x10, 0x1f), 0x1f);
        assert_eq!(bits_between(0x0100_0000, 0x0fff_ffff), 0x0fff_ffff);
        assert_eq!(bits_between(0x0110_0000, 0x0400_0000), 0x0710_0000);
        assert_eq!(bits_between(1, u32::MAX), 1, "whoever has any mark");
        let turned = ("byteorder", numbers(&[(1, 1), (2, 1)]));
        let ends = [data(3, 0x0100_0000_u32.to_be()), data(4, 0x0fff_ffff_u32.to_be())].concat();
        let range = ("range", [numbers(&[(1, 1), (2, 0)]), ends].concat());
        assert_eq!(rule(&[load(), turned, range]), 0x0fff_ffff);
    }

    #[test]
    fn of_a_masked_mark_in_a_key_of_several_parts_the_bits_count_that_are_left() {
        let address = |to| ("payload", numbers(&[(1, to), (2, 1), (3, 12), (4, 4)]));
        let second = ("meta", numbers(&[(1, 9), (2, MARK)]));
        let masked = ("bitwise", [numbers(&[(1, 9), (2, 9)]), data(4, 0x00ff_fff0), data(5, 0)].concat());
        let looked_up = ("lookup", numbers(&[(2, 1)]));
        assert_eq!(rule(&[address(1), second.clone(), masked.clone(), looked_up.clone()]), 0x00ff_fff0);
        assert_eq!(rule(&[load(), and_xor(0x00ff_fff0, 0), address(9), looked_up]), 0x00ff_fff0);
        let added = ("dynset", numbers(&[(4, 1)]));
        assert_eq!(rule(&[address(1), second, masked, added]), 0x00ff_fff0);
    }

    #[test]
    fn marks_of_iptables_are_read_from_its_matches_and_targets() {
        let words = |list: &[u32]| list.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        assert_eq!(of_extension("mark", &words(&[0x40000, 0xff0000, 0])), 0xff0000);
        assert_eq!(of_extension("MARK", &words(&[0x1, u32::MAX])), 1);
        assert_eq!(of_extension("CONNMARK", &words(&[0, u32::MAX, u32::MAX, 2])), 0, "all is copied");
        assert_eq!(of_extension("CONNMARK", &words(&[0x200, 0x200, 0, 0])), 0x200);
        assert_eq!(of_extension("TPROXY", &words(&[u32::MAX, 0x8])), 8);
        assert_eq!(of_extension("mark", &[1]), 0, "torn");
        let xt = [nested(1, b"mark\0"), numbers(&[(2, 1)]), nested(3, &words(&[4, 4, 0]))].concat();
        assert_eq!(rule(&[("match", xt)]), 4);
    }

    #[test]
    fn torn_expressions_do_not_panic() {
        let whole = nested(1, &[nested(1, b"bitwise\0"), nested(2, &and_xor(1, 2).1)].concat());
        for length in 0..whole.len() {
            let _ = of_rule(&whole[..length]);
        }
    }
}
