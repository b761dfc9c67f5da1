//! Benchmarks: always beside a peer in the same run, on the same etcd and PostgreSQL.
//!
//! [`failover`] measures how long clients can't write when the leader changes.

pub mod failover;
