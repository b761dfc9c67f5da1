//! Benchmarks on real servers.
//!
//! [`failover`] measures how long clients can't write when the leader changes, beside a peer in the same run, on the same etcd
//! and PostgreSQL. [`relay`] measures what a proxy costs while nothing happens, beside other proxies in front of the same
//! server. The program `faults` measures ours alone, for faults that take longer.

pub mod failover;
pub mod relay;
pub mod table;
