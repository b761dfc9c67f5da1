//! Whole clusters on this machine, for `trunklinectl demo`, the tests and the benchmarks.
//!
//! A [`Lab`] is a directory, a block of free ports and an unprivileged user; what is started in it ends with it, however
//! the program that started it ends. In it live [`Etcd`], the nodes of a [`Cluster`] and the [`Proxy`]s in front of them;
//! each is a real program of this machine, so that Patroni or HAProxy can stand in for ours. [`workload`] writes and
//! reads through them and knows afterwards what was promised, [`wait`] waits with a bound and says what it waited for.

pub mod cgroup;
pub mod cluster;
pub mod demo;
pub mod etcd;
mod files;
pub mod gate;
pub mod node;
pub mod place;
pub mod ports;
pub mod process;
pub mod proxy;
pub mod rest;
pub mod tools;
pub mod wait;
pub mod workload;

pub use cluster::{Cluster, Spec, Timing};
pub use etcd::Etcd;
pub use gate::Gate;
pub use node::Node;
pub use place::Lab;
pub use ports::Ports;
pub use proxy::Proxy;
pub use tools::{Program, Tools};
