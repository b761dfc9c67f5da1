//! `trunkline-router`: one address that always leads to the right server.
//!
//! | question | file |
//! | --- | --- |
//! | where may a session go, and whose sessions must end? | [`table`], [`rule`], [`lag`] (all pure) |
//! | where does an event of the DCS become a route? | [`follow`], with [`probe`] and [`heard`] (pure) |
//! | how does a new leader learn that the one before it has no sessions here? | [`registration`] |
//! | what is the first packet? | [`startup`], [`proxy`] (both pure) |
//! | what happens to one client? | [`session`], [`search`], with [`hold`], [`balance`], [`answer`], [`cancel`], [`key`], [`reply`] |
//! | where does TLS end or begin, if it does? | [`crypto`], [`wire`], [`sasl`] |
//! | where do bytes move? | [`relay`], with [`boundary`] (pure) |
//! | which sessions are there, and who ends them? | [`sessions`], [`survey`] |
//! | how many at once? | [`places`], [`port`], [`hold`], [`memory`] |
//! | where is a server that is known by name? | [`names`] |
//! | who listens, and what does a changed configuration change? | [`accept`], [`listeners`], [`reload`], [`socket`] |
//! | how does the process stop or hand over? | [`server`], [`handover`] |
//! | what does an operator see? | [`admin`], [`metrics`] |
//!
//! The router reads the DCS and writes nothing there but its own registration, where the cluster asks for one; it knows no
//! password and speaks no SQL: it looks at the first packet of
//! a client and, for the key that cancels the session, at the start of what the server says in plain text; after that at
//! the heads of messages in plain text that it copies anyway, to know when a session is idle.

pub mod accept;
pub mod admin;
pub mod answer;
pub mod balance;
pub mod boundary;
pub mod cancel;
pub mod crypto;
pub mod follow;
pub mod handover;
pub mod heard;
pub mod hold;
pub mod key;
pub mod lag;
pub mod listeners;
pub mod memory;
pub mod metrics;
pub mod names;
pub mod places;
pub mod port;
pub mod probe;
pub mod proxy;
pub mod registration;
pub mod relay;
pub mod reload;
pub mod reply;
pub mod router;
pub mod rule;
pub mod sasl;
pub mod search;
pub mod server;
pub mod session;
pub mod sessions;
pub mod silence;
pub mod socket;
pub mod startup;
pub mod survey;
pub mod table;
pub mod wire;

pub use router::Router;
