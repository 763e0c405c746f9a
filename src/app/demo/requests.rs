//! What the demo asks for, and what must come of it.

/// The length of the download in bytes.
pub(super) const DOWNLOAD: usize = 8 << 20;
/// Its path.
pub(super) const DOWNLOAD_PATH: &str = "/8MiB";
/// Bytes that the TCP echo is sent.
pub(super) const ECHO: usize = 64 << 10;

/// The byte at `offset` of the download: a pattern that no ring or segment size divides.
pub(super) fn byte_at(offset: usize) -> u8 {
    (offset % 251) as u8
}

/// One request.
#[derive(Debug)]
pub(super) struct Request {
    /// As a person would say it.
    pub(super) words: &'static str,
    /// What the client does.
    pub(super) act: Act,
    /// The rule that must match, as written; None where no rule is asked.
    pub(super) rule: Option<&'static str>,
    /// The outbounds that must carry it.
    pub(super) way: &'static str,
    /// What the client must find.
    pub(super) back: &'static str,
}

/// What the client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    /// HTTP GET of a path, at whichever address the C library puts first.
    Get(&'static str, u16, &'static str),
    /// The same, at the name's IPv4 address.
    Get4(&'static str, u16, &'static str),
    /// The same, at its IPv6 address.
    Get6(&'static str, u16, &'static str),
    /// The same as the first, given up early.
    GetBriefly(&'static str, u16, &'static str),
    /// Sends to a TCP echo, finishes, and reads what comes back.
    Echo(&'static str, u16),
    /// Sends a datagram and waits for one.
    Datagram(&'static str, u16),
    /// Looks up the address of a name, and the name of that address.
    Reverse(&'static str),
}

impl Act {
    /// The host, as the client writes it.
    pub(super) fn host(self) -> &'static str {
        match self {
            Self::Get(host, ..)
            | Self::Get4(host, ..)
            | Self::Get6(host, ..)
            | Self::GetBriefly(host, ..)
            | Self::Echo(host, _)
            | Self::Datagram(host, _)
            | Self::Reverse(host) => host,
        }
    }

    /// Whether the host is a name, so that a fake address stands for it.
    pub(super) fn by_name(self) -> bool {
        self.host().parse::<std::net::IpAddr>().is_err()
    }

    /// Whether it cannot be done without IPv6.
    pub(super) fn needs_v6(self) -> bool {
        matches!(self, Self::Get6(..)) || self.host().contains(':')
    }
}

const fn request(words: &'static str, act: Act, rule: &'static str, way: &'static str, back: &'static str) -> Request {
    Request { words, act, rule: Some(rule), way, back }
}

/// All of them, in order.
pub(super) const REQUESTS: [Request; 19] = [
    request(
        "GET www.shop.example/",
        Act::Get4("www.shop.example", 80, "/"),
        "DOMAIN-SUFFIX,shop.example,DIRECT",
        "DIRECT",
        "200 OK, straight",
    ),
    request(
        "GET www.news.example/",
        Act::Get("www.news.example", 80, "/"),
        "DOMAIN-SUFFIX,news.example,abroad",
        "abroad",
        "200 OK, from abroad",
    ),
    request(
        "GET wiki.office.example/",
        Act::Get("wiki.office.example", 80, "/"),
        "DOMAIN-KEYWORD,office,office",
        "office",
        "200 OK, from the office",
    ),
    request(
        "GET films.example/",
        Act::Get("films.example", 80, "/"),
        "DOMAIN,films.example,choice",
        "choice -> abroad",
        "200 OK, from abroad",
    ),
    request(
        "GET www.shop.example/8MiB",
        Act::Get4("www.shop.example", 80, DOWNLOAD_PATH),
        "DOMAIN-SUFFIX,shop.example,DIRECT",
        "DIRECT",
        "8 MiB, every byte right",
    ),
    request(
        "the same through IPv6",
        Act::Get6("www.shop.example", 80, DOWNLOAD_PATH),
        "DOMAIN-SUFFIX,shop.example,DIRECT",
        "DIRECT",
        "8 MiB, every byte right",
    ),
    request(
        "GET ads.example/",
        Act::Get("ads.example", 80, "/"),
        "DOMAIN-SUFFIX,ads.example,REJECT",
        "REJECT",
        "refused",
    ),
    request(
        "UDP to ads.example:443",
        Act::Datagram("ads.example", 443),
        "DOMAIN-SUFFIX,ads.example,REJECT",
        "REJECT",
        "refused",
    ),
    request(
        "UDP to mail.office.example:443",
        Act::Datagram("mail.office.example", 443),
        "DOMAIN-KEYWORD,office,REJECT",
        "REJECT",
        "refused",
    ),
    request(
        "GET tracker.example/",
        Act::GetBriefly("tracker.example", 80, "/"),
        "DOMAIN,tracker.example,REJECT-DROP",
        "REJECT-DROP",
        "no answer, gave up",
    ),
    request(
        "closed port www.shop.example:81",
        Act::Get("www.shop.example", 81, "/"),
        "DOMAIN-SUFFIX,shop.example,DIRECT",
        "DIRECT",
        "refused",
    ),
    request(
        "TCP echo www.shop.example:2323",
        Act::Echo("www.shop.example", 2323),
        "DST-PORT,2323,abroad",
        "abroad",
        "64 KiB back, from abroad",
    ),
    request(
        "UDP echo echo.shop.example:7",
        Act::Datagram("echo.shop.example", 7),
        "DOMAIN-SUFFIX,shop.example,DIRECT",
        "DIRECT",
        "echo, straight",
    ),
    request(
        "UDP echo echo.news.example:7",
        Act::Datagram("echo.news.example", 7),
        "DOMAIN-SUFFIX,news.example,abroad",
        "abroad",
        "echo, from abroad",
    ),
    request(
        "GET 198.51.100.7/",
        Act::Get("198.51.100.7", 80, "/"),
        "IP-CIDR,198.51.100.0/24,abroad,no-resolve",
        "abroad",
        "200 OK, from abroad",
    ),
    request(
        "GET [2001:db8::10]/",
        Act::Get("2001:db8::10", 80, "/"),
        "IP-CIDR6,2001:db8::/32,DIRECT,no-resolve",
        "DIRECT",
        "200 OK, straight",
    ),
    request(
        "GET hidden.example/",
        Act::Get("hidden.example", 80, "/"),
        "IP-CIDR,192.0.2.0/24,REJECT",
        "REJECT",
        "refused",
    ),
    request("GET blog.example/", Act::Get("blog.example", 80, "/"), "MATCH,DIRECT", "DIRECT", "200 OK, straight"),
    Request {
        words: "reverse look-up www.shop.example",
        act: Act::Reverse("www.shop.example"),
        rule: None,
        way: "tunproxy itself",
        back: "www.shop.example",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_of_the_profile_is_shown_and_every_rule_shown_is_in_it() {
        let profile = include_str!("../../../profiles/demo.yaml");
        let rules: Vec<_> = profile.split("rules:\n").nth(1).unwrap().lines().map(str::trim).collect();
        let rules: Vec<_> = rules.into_iter().filter_map(|line| line.strip_prefix("- ")).collect();
        for rule in &rules {
            assert!(REQUESTS.iter().any(|request| request.rule == Some(rule)), "nothing shows {rule}");
        }
        for request in &REQUESTS {
            assert!(request.rule.is_none_or(|rule| rules.contains(&rule)), "{request:?}");
        }
    }
}
