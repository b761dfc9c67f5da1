//! The HA loop that ships, in a simulated world.
//!
//! Nothing of the agent is modelled: `trunkline_agent::ha` runs as it is, with its keeper, its follower of the DCS, its
//! decisions. What is modelled is everything around it, behind the traits that the agent itself is written against:
//!
//! | part of the world | here | instead of |
//! | --- | --- | --- |
//! | time and tasks | [`executor`] | tokio and the host's clocks |
//! | the DCS | `trunkline_common::dcs::memory` | etcd |
//! | PostgreSQL | [`wal`], [`server`], [`commit`], [`streaming`], [`slots`], [`postgres`] | PostgreSQL |
//! | the guard | [`guard`] | a process of its own and its egress fence |
//! | the other members' REST APIs | [`peers`] | HTTP |
//! | routers and clients | [`clients`], [`reader`], with the real route table and registration | sockets |
//!
//! [`scenario`] says what goes wrong (and is drawn from a seed), [`world`] lets it happen, [`judge`] says what must not happen. One seed is one world.

pub mod clients;
pub mod commit;
pub mod draw;
pub mod executor;
pub mod guard;
pub mod judge;
pub mod outside;
pub mod peers;
pub mod postgres;
pub mod reader;
pub mod scenario;
pub mod server;
pub mod sessions;
pub mod shrink;
pub mod slots;
pub mod stage;
pub mod streaming;
pub mod trace;
pub mod trouble;
pub mod wal;
pub mod world;
