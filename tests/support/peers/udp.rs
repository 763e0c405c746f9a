//! UDP servers.

use std::net::SocketAddr;

use super::{Peer, Peers, Record};

impl Peers {
    /// Sends every datagram back to where it came from and notes that address.
    pub(crate) fn udp_echo(&self, address: SocketAddr, record: &Record) -> Peer {
        let record = record.clone();
        self.udp(address, async move |socket| {
            let mut buffer = vec![0; 65_536];
            loop {
                // An error here is an ICMP answer to an earlier reply, no reason to stop.
                let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
                record.note(from.to_string());
                let _ = socket.send_to(&buffer[..length], from).await;
            }
        })
    }
}
