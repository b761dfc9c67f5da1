//! Benchmarks on real clusters.
//!
//! [`failover`] measures how long clients can't write when the leader changes, beside a peer in the same run, on the same etcd
//! and PostgreSQL. The program `faults` measures ours alone, for faults that take longer.

pub mod failover;
