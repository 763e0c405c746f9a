//! Sessions -> outbounds: the router, associations, relay and live connections.

mod router;

pub use router::{Decision, Router, UnknownTarget};
