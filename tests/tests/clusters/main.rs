//! Whole clusters of real programs, one theme a file.

mod agent;
mod backup;
mod bootstrap;
mod configuration;
mod dcs;
mod demo;
mod drivers;
mod failover;
mod guard;
mod hooks;
mod inquiry;
mod leading;
mod mixed;
mod patroni;
mod ports;
mod registration;
mod rejoin;
mod restart;
mod router;
mod schedule;
mod slots;
mod standbys;
mod switchover;
mod systemd;
mod versions;
mod vip;
