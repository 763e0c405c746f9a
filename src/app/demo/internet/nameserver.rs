//! The nameserver: A and AAAA of the names that exist, NXDOMAIN for others.

use std::net::IpAddr;

use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA};
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

use super::{Asked, addresses};

/// How long answers may be kept, in seconds.
const TTL: u32 = 60;

/// Answers for ever, and notes each name in `asked`.
pub(super) async fn serve(socket: UdpSocket, asked: Asked) {
    let mut buffer = vec![0; 4096];
    loop {
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        if let Some(answer) = answer(&buffer[..length], &asked) {
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

fn answer(query: &[u8], asked: &Asked) -> Option<Vec<u8>> {
    let query = Message::from_vec(query).ok().filter(|query| query.metadata.message_type == MessageType::Query)?;
    let question = query.queries.first()?;
    let name = question.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
    let mut reply = Message::response(query.metadata.id, OpCode::Query);
    reply.metadata.recursion_desired = query.metadata.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.add_query(question.clone());
    match addresses(&name) {
        None => reply.metadata.response_code = ResponseCode::NXDomain,
        Some(addresses) => {
            let data = addresses.iter().filter_map(|ip| match (ip, question.query_type()) {
                (IpAddr::V4(ip), RecordType::A) => Some(RData::A(A(*ip))),
                (IpAddr::V6(ip), RecordType::AAAA) => Some(RData::AAAA(AAAA(*ip))),
                _ => None,
            });
            reply.add_answers(data.map(|data| Record::from_rdata(question.name().clone(), TTL, data)));
        }
    }
    asked.lock().insert(name);
    reply.to_vec().ok()
}
