//! The network changes while we run.
