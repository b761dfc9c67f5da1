//! Whole clusters under random faults, and what clients saw of it.
//!
//! `chaos` starts three nodes, three etcd members and two routers, each on a host of its own: a network namespace with
//! an address, and a small file system. Faults come from a [`schedule`], which comes from a seed or a file;
//! [`faults`] injects and heals them in the [`world`]. Meanwhile the [`workload`] writes, appends and reads through the
//! routers and past them and keeps a [`history`] of every call; [`check`] is given that history after the run, and
//! what the database holds then, and decides; so does what routers sent on the [`wire`]. The schedule and the checkers are pure.

pub mod check;
pub mod faults;
mod files;
pub mod history;
pub mod isolate;
mod network;
pub mod report;
pub mod run;
pub mod schedule;
pub mod wire;
pub mod workload;
pub mod world;
