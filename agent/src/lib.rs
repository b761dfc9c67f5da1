//! The node agent: owns one PostgreSQL and takes its part in electing the cluster's leader.
//!
//! * [`ha`] decides who leads and carries it out: [`ha`]'s `decide` is a pure function of one view of the cluster.
//! * [`guard`] ends writes when the lease is over, whatever has become of the agent.
//! * [`postgres`] starts, stops, promotes, clones and rewinds the server; it never asks the DCS anything.
//! * [`rest`] answers health checks and operators; it never acts by itself but sends a [`node::Command`].
//! * [`init`] is the first process of a container, and reaps.
//! * [`rto`] says how long writes will be out.
//! * [`peer`] asks other members' REST APIs how they are.
//! * [`ctl`] is `trunklinectl`; [`lab`] runs whole clusters on this machine for its `demo` and for the tests.

pub mod ctl;
pub mod guard;
pub mod ha;
pub mod init;
pub mod lab;
pub mod node;
pub mod peer;
pub mod postgres;
pub mod rest;
pub mod rto;
