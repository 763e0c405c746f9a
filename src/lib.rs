//! tunproxy: a transparent proxy for Linux that can say why a flow went where it went.
//!
//! The modules stand in the order in which data meets them:
//!
//! ```text
//! packet   TUN -> inbound::tun -> stack -> flow + Session -> Dispatcher -> Router -> Outbound -> relay -> network
//! name     :53 -> inbound::tun -> dns -> fake IP | resolver -> upstream         the answer goes back the same way
//! un-fake  a fake address becomes its name once, on entering the Dispatcher
//! host     Profile -> HostPlan (plain data) -> apply, journalled -> Applied -> revert on stop, on error, or by `cleanup`
//! ```
//!
//! A module imports only what stands above it in this list; `tests/architecture.rs` holds that line.

pub mod net;
pub mod stack;
pub mod session;
pub mod rules;
pub mod profile;
pub mod platform;
pub mod dns;
pub mod outbound;
pub mod dispatch;
pub mod inbound;
pub mod app;
pub mod cli;
