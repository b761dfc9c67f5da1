//! Whole clusters of real programs, one theme a file.

mod agent;
mod bootstrap;
mod configuration;
mod dcs;
mod demo;
mod failover;
mod guard;
mod patroni;
mod ports;
mod rejoin;
mod router;
mod switchover;
