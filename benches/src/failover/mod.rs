//! The write outage that clients see, for three faults and three arrangements of agent and proxy.
//!
//! [`arrangement`] sets one up, [`rounds`] does the faults and measures, [`stages`] says where our time goes, [`report`]
//! prints it.

pub mod arrangement;
pub mod report;
pub mod rounds;
pub mod stages;

pub use arrangement::Arrangement;
pub use rounds::{Fault, Measured, Round, measure};
