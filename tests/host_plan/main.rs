//! What we change on a host, tried on hosts made for it: each test has namespaces of its own.

mod host;
mod netlink;
mod sandbox;
mod traffic;
mod undone;
