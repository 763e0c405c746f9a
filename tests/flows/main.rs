//! The stack in memory: real TCP clients, raw segments and garbage against `tunproxy::stack`, over a link that may lose,
//! repeat and reorder, under a clock that the test owns. No privileges, no sockets, no waiting.

#[cfg(test)]
mod world;

#[cfg(test)]
mod opening;
#[cfg(test)]
mod closing;
#[cfg(test)]
mod windows;
#[cfg(test)]
mod weather;
#[cfg(test)]
mod rough;
#[cfg(test)]
mod gaps;
#[cfg(test)]
mod told;
#[cfg(test)]
mod paths;
#[cfg(test)]
mod limits;
mod memory;
#[cfg(test)]
mod idleness;
#[cfg(test)]
mod datagrams;
#[cfg(test)]
mod echoes;
#[cfg(test)]
mod messages;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod fairness;
