//! The chain in which what was to enter the TUN and goes another way ends.

use super::{CAPTURE_DNS, Writer, chain, has_mark, set_mark};

/// Before whatever others do with what leaves: they may give it marks there too, for its queue for instance.
const LEAVING: &str = "filter hook postrouting priority -2147483648";

impl Writer<'_> {
    /// What was to be captured and cannot be moved (SO_BINDTODEVICE) stays inside, and so does what somebody has turned
    /// away. Only here is the new way known. A mark says less: others may set one as a whole, so all is asked once more.
    pub(super) fn caught(&self) -> String {
        let mut lines = vec![
            format!("{} return", has_mark(self.numbers.own)),
            format!("{} return", self.oif_tun("")),
            "oif \"lo\" return".to_owned(),
            // Before Linux 5.7 nobody knows here where a packet came from; it then passes for having no sender here.
            format!("{} return", self.iif_tun()),
        ];
        lines.extend(self.of_other_runs("oifname"));
        lines.extend(self.foreign_marks());
        if self.options.kill_switch && self.options.takes_own_traffic() {
            lines.extend(self.goes_past());
            return chain("caught", LEAVING, &lines);
        }
        lines.push(format!("{} return", self.is_answer()));
        if self.options.dns_hijack && self.options.takes_own_traffic() {
            lines.extend(self.users_left_out());
            lines.push(format!("meta skuid >= 0 jump {CAPTURE_DNS}"));
        }
        let mark = self.numbers.capture.mark;
        lines.push(format!("meta mark & {mark:#x} != 0 meta skuid >= 0 counter drop"));
        chain("caught", LEAVING, &lines)
    }

    /// The mark that a socket has asked for, where somebody has taken it from its packets: ours, without which what we send
    /// would come back to us, and under a kill switch the carriers' of others, which would be held back.
    pub(super) fn marks_taken_away(&self) -> Vec<String> {
        // Of what has no user (a reset of the kernel's) old kernels look the socket up, and fail.
        let regains = |mark| {
            let asked = has_mark(mark).replacen("meta", "meta skuid >= 0 socket", 1);
            format!("{asked} {} return", set_mark(mark))
        };
        let others = self.survey.foreign_marks().into_iter().filter(|_| self.options.kill_switch);
        let marks = std::iter::once(self.numbers.own).chain(others);
        if self.survey.parameters.finds_sockets { marks.map(regains).collect() } else { Vec::new() }
    }
}
